"""The recipe of pre-training: what decays, at which rate, in which batches (paper T8; official main_pretrain.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from maekit.conformance.check import Answer, Check, Subject

SOURCE = "paper table 8; official main_pretrain.py L163-180"


def _optimizer(subject: Subject) -> Any:
    return subject.part("pretrain_optimizer")(subject.model)


def _decays(optimizer: Any) -> dict[int, float]:
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def decay(subject: Subject) -> Answer:
    """Look which matrices and vectors decay; the tokens have a check of their own."""
    decays = _decays(subject.once(_optimizer))
    tokens = {id(subject.tensors[name]) for name in ("cls_token", "mask_token") if name in subject.tensors}
    wrong, rates = [], set()
    for name, p in subject.model.named_parameters():
        if not p.requires_grad or id(p) in tokens:
            continue
        exempt = p.ndim <= 1 or name.endswith(".bias")
        if id(p) not in decays or bool(decays[id(p)]) == exempt:
            wrong.append(name)
        elif not exempt:
            rates.add(decays[id(p)])
    if wrong:
        return Answer(False, f"otherwise for {len(wrong)}, the first {wrong[0]}", "0.05 for all but 1-D and .bias")
    return Answer(rates == {0.05}, ", ".join(f"{r:g}" for r in rates) + " for all but 1-D and .bias",
                  "0.05 for all but 1-D and .bias")  # fmt: skip


def decay_tokens(subject: Subject) -> Answer:
    """Look whether class token and mask token decay."""
    decays = _decays(subject.once(_optimizer))
    found = {name: decays.get(id(subject.tensor(name))) for name in ("cls_token", "mask_token")}
    words = ", ".join(f"{name} {'in no group' if rate is None else f'{rate:g}'}" for name, rate in found.items())
    return Answer(all(found.values()), words, "both decay")


def fixed_tables(subject: Subject) -> Answer:
    """Look whether the optimizer would move the fixed tables."""
    decays = _decays(subject.once(_optimizer))
    held = {name: subject.tensors[name] for name in ("pos_embed", "decoder_pos_embed") if name in subject.tensors}
    moved = [name for name, p in held.items() if p.requires_grad and id(p) in decays]
    return Answer(not moved, f"trained: {', '.join(moved)}" if moved else "not trained", "not trained")


def betas(subject: Subject) -> Answer:
    """Look at the optimizer."""
    optimizer = subject.once(_optimizer)
    found = (type(optimizer).__name__, tuple(optimizer.defaults.get("betas", ())))
    return Answer(found == ("AdamW", (0.9, 0.95)), f"{found[0]}, betas {found[1]}", "AdamW, betas (0.9, 0.95)")


def learning_rate(subject: Subject) -> Answer:
    """Ask for the rate at named steps of 800 epochs of 312 steps, 40 of them warm-up, batch 4096."""
    rate, peak, epoch = subject.part("learning_rate"), 2.4e-3, 312
    named = {0: 0.0, epoch // 2: peak / 80, 20 * epoch: peak / 2, 40 * epoch: peak, 420 * epoch: peak / 2,
             800 * epoch: 0.0}  # fmt: skip
    given = {step: rate(step, steps=800 * epoch, warmup=40 * epoch, base_lr=1.5e-4, batch=4096) for step in named}
    wrong = [step for step, expected in named.items() if abs(given[step] - expected) > 1e-9]
    words = {step: f"{value:.3g} at epoch {step / epoch:g}" for step, value in given.items()}
    if wrong:
        return Answer(False, words[wrong[0]], f"{named[wrong[0]]:.3g}")
    return Answer(True, ", ".join(words.values()), "warm-up from 0 by the step, half a cosine to 0")


def effective_batch(subject: Subject) -> Answer:
    """Ask how the peak follows the global batch."""
    rate = subject.part("learning_rate")
    found = [rate(10, steps=100, warmup=10, base_lr=1.5e-4, batch=batch) for batch in (256, 4096)]
    right = all(abs(a - b) < 1e-12 for a, b in zip(found, (1.5e-4, 2.4e-3), strict=True))
    return Answer(right, f"{found[0]:.3g} for 256, {found[1]:.3g} for 4096", "0.00015 and 0.0024: base * batch / 256")


class _Weighing(nn.Module):
    """Its loss is linear in a weight per image, so that a step of rate 1 writes down how much each image counted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(number))

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean over images of the weight whose pixel is lit."""
        return (images.flatten(1)[:, : len(self.weight)] @ self.weight).mean()


def _shares(subject: Subject, number: int, batch: int, micro_batch: int) -> list[float]:
    """Train one epoch on `number` images, each with a pixel of its own lit; return what each counted."""
    images = torch.zeros(number, 1, 4, 4)
    for i in range(number):
        images[i].view(-1)[i] = 1.0
    module = _Weighing(number)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    subject.part("train_epoch")(module, images, optimizer, batch=batch, micro_batch=micro_batch)
    return [round(-float(value), 4) for value in module.weight.detach()]


def accumulation(subject: Subject) -> Answer:
    """Train on 12 images in batches of 6, in micro-batches of 4 and 2."""
    found = sorted(set(_shares(subject, 12, 6, 4)))
    right = found == [round(1 / 6, 4)]
    return Answer(right, "each image counts " + " or ".join(f"{share:g}" for share in found), "1/6, all alike")


def leftovers(subject: Subject) -> Answer:
    """Train on 3 images in batches of 4, and on 10: what fills no batch must not vanish unsaid."""
    few, some = _shares(subject, 3, 4, 1), _shares(subject, 10, 4, 1)
    trained = sum(share > 0 for share in some)
    if not any(few):
        return Answer(False, "3 images with batch 4: no update ever", "one short batch")
    short = sorted(set(some)) == [0.25, 0.5]
    found = f"3 of 3; {trained} of 10, the last {'in a short batch' if short else 'left out'}"
    return Answer(all(few) and trained in (8, 10), found, "one short batch; incomplete ones trained, or dropped whole")


CHECKS = (
    Check("decay", "weight decay .05 on all but 1-D parameters and biases", SOURCE,
          ("D3", "3.4 optimiser", "trap 4.7"), "exact", "a list",
          "another regularisation than the paper's", decay),
    Check("decay-tokens", "class token and mask token do decay", "official main_pretrain.py L179 (timm 0.3.2's rule)",
          ("D17", "3.4 optimiser", "3.10 tokens decay"), "exact", "a list",
          "differs from the authors' run; must be matched or declared", decay_tokens),
    Check("decay-tables", "the fixed tables are not trained", SOURCE, ("3.4 optimiser", "trap 4.7"), "exact", "a list",
          "decay pulls the positions to zero", fixed_tables),
    Check("betas", "AdamW with betas .9 and .95", SOURCE, ("D3", "3.4 optimiser"), "exact", "constants",
          "a slower second moment: instability at large batches", betas),
    Check("learning-rate", "warm-up from 0 and half-cosine to 0, by the step", "official lr_sched.py L9-21",
          ("D11", "3.4 lr", "3.10 lr"), "1e-9", "float64 arithmetic", "steps of an epoch share a rate; a late start",
          learning_rate),
    Check("effective-batch", "lr = base_lr * global batch / 256", SOURCE,
          ("D11", "3.4 lr", "3.10 blr", "trap 4.13"), "1e-12", "float64 arithmetic",
          "a rate wrong by the number of processes or accumulation steps", effective_batch),
    Check("accumulation", "accumulated micro-batches equal the whole batch", "official engine_pretrain.py",
          ("3.4 batch", "trap 4.10"), "1e-4", "float32 sums", "uneven micro-batches weigh some images more",
          accumulation),
    Check("leftovers", "images that fill no batch are trained, or dropped knowingly", "mae#49",
          ("D14", "3.4 batch", "3.10 leftovers", "trap 4.16"), "exact", "a count",
          "small sets: no update ever happens, and nothing says so", leftovers),
)  # fmt: skip
