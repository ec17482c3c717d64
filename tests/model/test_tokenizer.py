"""Tokenizers: the codebook by hand, learning on real images, and DALL-E's encoder against a plain one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maekit.data.image import read_image
from maekit.data.sources import open_source
from maekit.errors import MaekitError
from maekit.model.tokenizer import (
    COMMITMENT,
    DEAD,
    DECAY,
    REVIVED,
    Codebook,
    DalleEncoder,
    VQTokenizer,
    create_tokenizer,
)
from maekit.seeds import seed_all


@pytest.fixture(scope="module")
def images() -> Tensor:
    """256 clothes (B, 1, 28, 28) in 0..1."""
    source = open_source("builtin:fashion", "train")
    return (
        torch.stack([read_image(bytes(source.read(i)), channels=1) for i in range(256)]).float() / 255  # type: ignore[arg-type]
    )


def small(vocabulary: int = 32, **more: object) -> VQTokenizer:
    seed_all(0)
    spec = {"vocabulary": vocabulary, "img_size": [28, 28], "patch": 7, "channels": 1, "width": 16, "blocks": 1}
    return VQTokenizer(**{**spec, "code_width": 8, "mean": [0.286], "std": [0.353], **more})  # type: ignore[arg-type]


def train(model: VQTokenizer, images: Tensor, steps: int) -> list[float]:
    """Train on all images at once; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    optimizer.register_step_post_hook(lambda *_: model.codebook.update())
    losses = []
    for step in range(steps):
        seed_all(0, step)
        loss = model.loss((images - 0.286) / 0.353)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------------ codebook


def test_an_update_moves_codes_by_running_means_and_draws_dead_ones_anew() -> None:
    seed_all(1)
    book = Codebook(4, 3)
    book.codes.copy_(F.normalize(torch.eye(4, 3) + 0.1, dim=1))
    book.counts.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))
    book.sums.copy_(book.counts[:, None] * book.codes)
    before = {name: value.clone() for name, value in book.named_buffers()}
    vectors = F.normalize(torch.tensor([[1.0, 0, 0.2], [1, 0.1, 0], [0, 1, 0]]), dim=1)
    ids = book.nearest(vectors)
    assert ids.tolist() == [0, 0, 1]
    book.note(vectors, ids)
    assert all(torch.equal(value, before[name]) for name, value in book.named_buffers())
    book.update()
    counts = [DECAY * 10 + (1 - DECAY) * 2, DECAY * 10 + (1 - DECAY) * 1]
    sums = DECAY * before["sums"][:2] + (1 - DECAY) * torch.stack([vectors[0] + vectors[1], vectors[2]])
    mean = sum(counts) / 4
    torch.testing.assert_close(book.counts, torch.tensor([*counts, REVIVED * mean, REVIVED * mean]))
    torch.testing.assert_close(book.codes[:2], F.normalize(sums, dim=1))
    for code in book.codes[2:]:  # never used: one of the vectors of the step, each
        assert float((vectors - code).norm(dim=1).min()) < 1e-6
    assert DEAD < REVIVED
    moved = {name: value.clone() for name, value in book.named_buffers()}
    book.update()  # nothing is pending
    assert all(torch.equal(value, moved[name]) for name, value in book.named_buffers())


def test_passes_of_a_step_count_as_one_batch() -> None:
    vectors = F.normalize(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    books = []
    for parts in (1, 4):
        seed_all(2)
        book = Codebook(8, 3)
        book.counts.fill_(1.0)  # none is dead
        book.sums.copy_(book.codes)
        for part in vectors.split(64 // parts):
            book.note(part, book.nearest(part))
        book.update()
        books.append(book)
    torch.testing.assert_close(books[0].codes, books[1].codes)
    torch.testing.assert_close(books[0].counts, books[1].counts)


def test_the_loss_is_squared_error_and_commitment_and_gradients_pass_straight_through(images: Tensor) -> None:
    model = small()
    inputs = (images[:8] - 0.286) / 0.353
    vectors = model.encoder(inputs)
    torch.testing.assert_close(vectors.norm(dim=2), torch.ones(8, 16))
    ids = (vectors @ model.codebook.codes.T).argmax(2)
    nearest = model.codebook.codes[ids]
    by_hand = (model.decoder(nearest, (4, 4)) - inputs).square().mean()
    by_hand = by_hand + COMMITMENT * (vectors - nearest).square().sum(2).mean()
    loss = model.loss(inputs)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


# -------------------------------------------------------------------------------------------------------- VQ


def test_it_learns_to_give_images_back_and_uses_its_codes(images: Tensor) -> None:
    model = small()
    losses = train(model, images, 60)
    assert losses[-1] < 0.4 * losses[0]
    codes = model.eval().codes(images)
    assert codes.shape == (256, 16) and codes.dtype == torch.int64 and 0 <= int(codes.min()) <= int(codes.max()) < 32
    assert len(codes.unique()) > 24
    back = model.decode(codes)
    assert back.shape == images.shape and 0 <= float(back.min()) <= float(back.max()) <= 1
    flat = images.unflatten(2, (4, 7)).unflatten(4, (4, 7)).mean((3, 5), keepdim=True)
    error = (back - images).square().mean()
    assert float(error) < float((flat.expand(-1, -1, -1, 7, -1, 7).reshape_as(images) - images).square().mean())


def test_training_is_a_function_of_the_seed(images: Tensor) -> None:
    models = [small() for _ in range(2)]
    losses = [train(model, images[:32], 5) for model in models]
    assert losses[0] == losses[1]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_codes_are_those_of_the_normalised_forward_pass_whatever_runs_around_it(images: Tensor) -> None:
    model = small().eval()
    with torch.no_grad():
        _, ids, _ = model((images - 0.286) / 0.353)
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.codes(images)
    assert float((codes == ids).float().mean()) > 0.999
    larger = F.interpolate(images, scale_factor=2, mode="nearest")
    assert model.codes(larger).shape == codes.shape


def test_the_spec_builds_the_same_tokenizer(images: Tensor) -> None:
    model = small().eval()
    again = create_tokenizer(model.spec).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.codes(images), model.codes(images)) and again.spec == model.spec


def test_passes_outside_of_training_leave_the_codebook_alone(images: Tensor) -> None:
    model = small()
    before = model.codebook.codes.clone()
    model.eval().loss(images)
    with torch.no_grad():
        model.train().loss(images)
    model.codebook.update()
    assert torch.equal(model.codebook.codes, before)


def test_another_grid_or_other_channels_are_refused() -> None:
    model = small()
    assert model.at_grid((4, 4), 1) is model
    with pytest.raises(MaekitError, match="found 4 x 4, expected 7 x 7, as the patches") as caught:
        model.at_grid((7, 7), 1)
    assert caught.value.code == "E-CONFIG-TOKENIZER"
    with pytest.raises(MaekitError, match="channels of the tokenizer: found 1, expected 3"):
        model.at_grid((4, 4), 3)
    with pytest.raises(MaekitError, match=r"\(B, 1, H, W\)"):
        model.codes(torch.zeros(2, 3, 28, 28))
    with pytest.raises(MaekitError, match="fill the image"):
        small(img_size=[30, 28])
    with pytest.raises(MaekitError, match=r"expected vq \| dalle"):
        create_tokenizer({"kind": "other"})


# ------------------------------------------------------------------------------------------------------ DALL-E


def miniature() -> dict[str, Tensor]:
    """Weights under the published names: 8 channels wide, two groups of two blocks, 20 codes."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"blocks.input": (8, 3, 7, 7), "blocks.output.conv": (20, 16, 1, 1)}
    for group, block, inputs, outputs in ((1, 1, 8, 8), (1, 2, 8, 8), (2, 1, 8, 16), (2, 2, 16, 16)):
        place, hidden = f"blocks.group_{group}.block_{block}", outputs // 4
        shapes[f"{place}.res_path.conv_1"] = (hidden, inputs, 3, 3)
        shapes[f"{place}.res_path.conv_2"] = (hidden, hidden, 3, 3)
        shapes[f"{place}.res_path.conv_3"] = (hidden, hidden, 3, 3)
        shapes[f"{place}.res_path.conv_4"] = (outputs, hidden, 1, 1)
        if inputs != outputs:
            shapes[f"{place}.id_path"] = (outputs, inputs, 1, 1)
    weights = {f"{name}.w": torch.randn(shape, generator=draw) * 0.4 for name, shape in shapes.items()}
    return weights | {f"{name}.b": torch.randn(shape[0], generator=draw) for name, shape in shapes.items()}


def plain_logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The published encoder written out for the miniature."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, weights[f"{name}.w"], weights[f"{name}.b"], padding="same")

    def block(place: str, x: Tensor) -> Tensor:
        y = conv(f"{place}.res_path.conv_1", x.clamp_min(0))
        y = conv(f"{place}.res_path.conv_2", y.clamp_min(0))
        y = conv(f"{place}.res_path.conv_3", y.clamp_min(0))
        y = conv(f"{place}.res_path.conv_4", y.clamp_min(0))
        return (conv(f"{place}.id_path", x) if f"{place}.id_path.w" in weights else x) + y / 16  # 4 layers, squared

    x = conv("blocks.input", images * 0.8 + 0.1)
    x = block("blocks.group_1.block_2", block("blocks.group_1.block_1", x))
    x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    x = block("blocks.group_2.block_2", block("blocks.group_2.block_1", x))
    return conv("blocks.output.conv", x.clamp_min(0))


def test_the_dvae_is_the_published_encoder_written_out() -> None:
    weights = miniature()
    spec = DalleEncoder.spec_of(weights)
    assert spec == {
        "kind": "dalle", "vocabulary": 20, "channels": 3, "width": 8, "groups": 2, "blocks": 2, "grid": None,
    }  # fmt: skip
    model = create_tokenizer(spec)
    assert isinstance(model, DalleEncoder)
    model.load_state_dict(weights)
    images = torch.rand(3, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    logits = plain_logits(weights, images)
    torch.testing.assert_close(model(images), logits)
    codes = model.at_grid((6, 8), 3).codes(images)
    assert torch.equal(codes, logits.argmax(1).flatten(1)) and len(codes.unique()) > 3
    assert model.codes(torch.rand(2, 3, 48, 64)).shape == (2, 48)  # resized to 12 x 16
    assert create_tokenizer(model.spec).grid == (6, 8)
    with pytest.raises(MaekitError, match="found 3, expected 1"):
        model.at_grid((6, 8), 1)


def test_the_published_size_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = DalleEncoder(grid=(14, 14))
    assert model.stride == 8 and model.vocabulary == 8192
    names = dict(model.named_parameters())
    assert len(names) == 2 * (1 + 8 * 4 + 3 + 1)
    assert tuple(names["blocks.group_4.block_1.id_path.w"].shape) == (2048, 1024, 1, 1)
    assert tuple(names["blocks.group_4.block_2.res_path.conv_1.w"].shape) == (512, 2048, 3, 3)
    assert tuple(names["blocks.output.conv.w"].shape) == (8192, 2048, 1, 1)


def test_weights_of_something_else_are_named() -> None:
    weights = miniature()
    with pytest.raises(MaekitError, match=r"blocks\.input\.w"):
        DalleEncoder.spec_of({name: value for name, value in weights.items() if "group_1" not in name})
