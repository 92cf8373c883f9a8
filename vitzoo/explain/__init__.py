"""What a model attends to: maps, rollout, flow, relevance, Grad-CAM, points, agents and slots, as tensors and as pictures.

    heat = vitzoo.explain.relevance(model, image, target=207)     # [B, h, w]
    vitzoo.explain.draw(image[0], heat[0], path="golden_retriever.png")

Attention weights are those of vitzoo's softmax ops, by their definition; a model of timm's has them after
``vitzoo.accelerate(model)``. Nothing of this is imported by ``import vitzoo``.
"""

from vitzoo.explain.activations import gradcam
from vitzoo.explain.gradients import norm_attribution, relevance
from vitzoo.explain.maps import attention_heat, attention_maps, list_attentions
from vitzoo.explain.picture import draw
from vitzoo.explain.places import agent_maps, sampling_points, slot_maps
from vitzoo.explain.rolling import flow, rollout

__all__ = [
    "agent_maps",
    "attention_heat",
    "attention_maps",
    "draw",
    "flow",
    "gradcam",
    "list_attentions",
    "norm_attribution",
    "relevance",
    "rollout",
    "sampling_points",
    "slot_maps",
]
