from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vitzoo
from vitzoo.data import UserError
from vitzoo.tasks import Classification
from vitzoo.tasks.optim import build_optimizer, scaled
from vitzoo.tasks.teaching import Teacher, distilled, places
from vitzoo.tasks.tuning import load_weights


def task(name="nat_micro", **kwargs):
    return Classification(name, kwargs.pop("num_classes", 6), **kwargs)


def batch(size=4, classes=6):
    return torch.rand(size, 3, 32, 32), torch.arange(size) % classes


def step(module):
    module.training_step(batch(), 0).backward()
    return {name for name, p in module.model.named_parameters() if p.grad is not None}


def test_head_alone_learns_and_the_rest_stands_still():
    module = task("van_micro", tune="head").train()
    before = {k: v.clone() for k, v in module.model.state_dict().items()}
    module.on_train_start()
    assert step(module) == {"head.fc.weight", "head.fc.bias"}
    after = module.model.state_dict()
    assert all(before[key].equal(after[key]) for key in before)  # BatchNorm's counts too
    assert module.model.head.fc.training


def test_frozen_names_are_wildcards_and_a_wrong_one_names_the_nearest():
    assert not any(name.startswith("stem") for name in step(task(frozen=["stem.*"])))
    with pytest.raises(UserError, match=r"'stm\.\*'.*Nearest: stem"):
        task(frozen=["stm.*"])


def test_low_rank_additions_start_at_nothing_and_learn_with_the_head():
    torch.manual_seed(0)
    plain = task().eval()
    torch.manual_seed(0)
    module = task(tune="lora", lora_rank=2).eval()
    images, _ = batch()
    base = {k.replace(".base_layer", ""): v for k, v in module.model.state_dict().items() if "lora_" not in k}
    plain.model.load_state_dict(base)
    torch.testing.assert_close(module(images), plain(images))
    learned = step(module)
    assert learned
    assert all("lora_" in name or name.startswith("head") for name in learned)
    with pytest.raises(UserError, match="names end in"):
        task(tune="lora", lora_targets="queries")


@pytest.mark.parametrize(
    ("kind", "words"), [({"tune": "lorra"}, "'lora'"), ({"tune": "head", "frozen": ["*"]}, "nothing to train")]
)
def test_what_cannot_be_tuned_is_said(kind, words):
    with pytest.raises(UserError, match=words):
        task(**kind)


def test_weights_of_a_run_start_another_with_other_classes_and_another_kernel(tmp_path):
    first = task(num_classes=6)
    torch.save({"state_dict": first.state_dict(), "loops": {}}, tmp_path / "best.ckpt")
    second = task(num_classes=3, weights=str(tmp_path / "best.ckpt"), kwargs={"kernel_size": 7})
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert ours["head.fc.weight"].shape[0] == 3
    tables = [key for key in theirs if key.endswith("rel_bias")]
    assert ours[tables[0]].shape[-1] == 13 != theirs[tables[0]].shape[-1]
    assert all(ours[key].equal(theirs[key]) for key in theirs if key not in tables and not key.startswith("head.fc"))
    with pytest.raises(UserError, match=r"model.weights: .*does not fit"):
        task("van_micro", weights=str(tmp_path / "best.ckpt"))


def test_weights_of_timms_models_load_too(tmp_path):
    import timm

    theirs = timm.create_model("test_vit", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    ours = timm.create_model("test_vit", num_classes=3)
    load_weights(ours, str(tmp_path / "x.pth"))
    assert ours.cls_token.equal(theirs.cls_token)
    with pytest.raises(UserError, match="does not fit"):
        load_weights(timm.create_model("test_resnet"), str(tmp_path / "x.pth"))


def taught(tmp_path, name="nat_micro", **kwargs):
    torch.save(vitzoo.create_model("nat_micro", num_classes=6).state_dict(), tmp_path / "teacher.pt")
    module = task(name, teacher="nat_micro", teacher_weights=str(tmp_path / "teacher.pt"), **kwargs)
    hp = module.hparams
    module.teacher = Teacher(hp.teacher, hp.teacher_weights, 6, {}, None)
    return module


@pytest.mark.parametrize("kind", ["hard", "soft", "token"])
def test_every_kind_of_teaching_reaches_every_parameter_of_the_student_alone(tmp_path, kind):
    module = taught(tmp_path, distill=kind, mixup=0.8)
    assert not any("teacher" in key for key in module.state_dict())
    module.training_step(batch(), 0).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in module.teacher.model.parameters())


def test_a_distillation_token_learns_from_the_teacher_and_the_class_token_from_the_labels(tmp_path):
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32}
    module = taught(tmp_path, "deit_tiny_distilled_patch16_224", kwargs=tiny, distill="hard", distill_weight=1.0)
    module.training_step(batch(), 0).backward()
    assert module.model.head_dist.weight.grad.abs().sum() > 0
    assert module.model.head.weight.grad.abs().sum() == 0


def test_distillation_losses_are_the_papers():
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    torch.testing.assert_close(
        distilled(student, teacher, "soft", 3.0).double(), 9 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-5, atol=1e-6
    )
    own = -student.log_softmax(-1)[range(3), teacher.argmax(-1)].mean()
    torch.testing.assert_close(distilled(student, teacher, "hard", 1.0).double(), own, rtol=1e-5, atol=1e-6)


def test_places_are_labelled_one_by_one():
    logits, teacher = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    one_by_one = [
        -(teacher[b, :, y, x].softmax(0) * logits[b, :, y, x].log_softmax(0)).sum()
        for b in range(2)
        for y in range(3)
        for x in range(3)
    ]
    torch.testing.assert_close(places(logits, teacher), torch.stack(one_by_one).mean())
    assert places(logits, torch.randn(2, 4, 6, 6)).isfinite()


def test_the_teacher_sees_pictures_normalised_as_it_learned_them(tmp_path):
    module = taught(tmp_path)
    teacher = module.teacher
    raw = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    teacher.to(torch.device("cpu"), mean.flatten().tolist(), std.flatten().tolist())
    theirs = [torch.tensor(teacher.config[key]).view(3, 1, 1) for key in ("mean", "std")]
    torch.testing.assert_close(teacher._seen((raw - mean) / std), (raw - theirs[0]) / theirs[1])


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(UserError, match="No published weights"):
        Teacher("van_micro", None, 6, {}, None)
    with pytest.raises(UserError, match=r"nat_mikro.*nat_micro"):
        Teacher("nat_mikro", "x", 6, {}, None)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "muon"])
def test_every_optimiser_of_the_papers_takes_a_step(name):
    model = vitzoo.create_model("nat_micro", num_classes=3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, name, 1e-2, 0.05, None, {"momentum": 0.9} if name == "sgd" else {})
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(not a.equal(b) for a, b in zip(before, model.parameters(), strict=True)) > 0.9 * len(before)


def test_adaptive_clipping_spares_the_head():
    module = task(agc=1e-4)
    step(module)
    before = {name: p.grad.clone() for name, p in module.model.named_parameters()}
    module.configure_gradient_clipping(None)
    after = {name: p.grad for name, p in module.model.named_parameters()}
    assert after["head.fc.weight"].equal(before["head.fc.weight"])
    clipped = [name for name in before if not name.startswith("head") and after[name].norm() < 0.5 * before[name].norm()]
    assert clipped
    with pytest.raises(UserError, match="give one of them"):
        module.configure_gradient_clipping(None, 1.0)


def test_the_last_group_of_an_epoch_is_a_mean_too():
    """7 batches in groups of 3: the seventh is alone, and Lightning will divide its loss by 3."""
    module, loss = task(), torch.tensor(2.0)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine, **_: mine)
    module._trainer = SimpleNamespace(
        fit_loop=loop, accumulate_grad_batches=3, num_training_batches=7, world_size=1, log_every_n_steps=1, strategy=strategy
    )
    assert [float(module.finished(loss, i)) for i in range(7)] == [2.0] * 6 + [6.0]


def test_the_square_root_rule():
    assert scaled(1e-3, 4096, 1024, "sqrt") == 2e-3
    with pytest.raises(UserError, match="'linear' or 'sqrt'"):
        scaled(1e-3, 4096, 1024, "cubic")


def test_binary_loss_takes_a_threshold_and_a_sum():
    module = task(loss="bce", bce_threshold=0.2, bce_sum=True, mixup=0.2)
    assert module.loss.target_threshold == 0.2
    assert module.loss.sum_classes
