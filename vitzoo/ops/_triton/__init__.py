"""What the Triton kernels of several ops share. Imported by their launches only, so that importing vitzoo needs no triton."""
