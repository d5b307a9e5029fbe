"""Our VQ autoencoder: shapes, order, locality, training, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from symbiotic.data.glyphs import all_attributes, render_generation
from symbiotic.images.autoencoder import VQAutoencoder
from symbiotic.images.quantiser import Codebook, k_means, nearest
from symbiotic.images.store import load_image_tokenizer
from symbiotic.images.tokenizer import ImageTokenizer, to_input, to_pixels
from symbiotic.images.training import Recipe, measure, train
from symbiotic.schema import RunError

SHORT = Recipe(steps=150, batch=32)
BRIEF = Recipe(steps=10, batch=32)
SMALL = {"codebook_size": 64, "width": 24}


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """uint8 [240, 20, 20, 3], every fourth combination."""
    rng = np.random.default_rng(3)
    return torch.from_numpy(np.stack([render_generation(a, rng) for a in all_attributes()[::4]]))


@pytest.fixture(scope="module")
def trained(pictures: Tensor) -> VQAutoencoder:
    return train(pictures[:200], SHORT, **SMALL)


def drawn(seed: int = 0, **arguments: int) -> VQAutoencoder:
    """Not trained; its codes are spread over what its encoder gives."""
    torch.manual_seed(seed)
    net = VQAutoencoder(**{**SMALL, **arguments}).eval()
    noise = torch.rand(20, 3, 20, 20) * 2 - 1
    with torch.no_grad():
        z = net.encoder(noise).permute(0, 2, 3, 1).flatten(0, 2)
        net.codebook.codes.copy_(z[:: len(z) // net.codebook_size][: net.codebook_size])
    return net


def test_pixels_survive_the_range_of_the_networks() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = to_input(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_pixels(x), pixels)
    assert torch.equal(to_pixels(x * 9), to_pixels((x * 9).clamp(-1, 1)))


@pytest.mark.parametrize("size", [(20, 20), (8, 24), (4, 4)])
def test_shapes_of_any_size_that_divides(size: tuple[int, int]) -> None:
    net = drawn()
    pixels = torch.randint(256, (3, *size, 3), dtype=torch.uint8)
    codes = net.encode(pixels)
    assert codes.shape == (3, size[0] // 4 * (size[1] // 4))
    assert codes.dtype == torch.int64
    assert codes.max() < net.codebook_size
    again = net.decode(codes, *size)
    assert again.shape == pixels.shape
    assert again.dtype == torch.uint8


@pytest.mark.parametrize(("blocks", "reach"), [(0, 0), (1, 1)])
def test_codes_are_row_major_and_see_no_further_than_their_blocks(blocks: int, reach: int) -> None:
    """A patch changes its own code and, a block of context each, its neighbours'; width 6 and height 3 tell rows from
    columns."""
    net = drawn(encoder_blocks=blocks)
    torch.manual_seed(5)
    pixels = torch.randint(256, (1, 12, 24, 3), dtype=torch.uint8)
    for row, column in ((1, 4), (2, 0)):
        other = pixels.clone()
        other[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.tensor([255, 0, 255], dtype=torch.uint8)
        changed = set(torch.nonzero((net.encode(other) != net.encode(pixels))[0]).flatten().tolist())
        near = {r * 6 + c for r in range(3) for c in range(6) if max(abs(r - row), abs(c - column)) <= reach}
        assert row * 6 + column in changed
        assert changed <= near


def test_a_code_paints_its_own_place_and_no_further_than_the_blocks() -> None:
    net = drawn(decoder_blocks=1)
    codes = torch.zeros(1, 18, dtype=torch.int64)
    other = codes.clone()
    other[0, 1 * 6 + 4] = 7
    painted = (net.decode(codes, 12, 24) != net.decode(other, 12, 24)).any(-1)[0]
    rows, columns = torch.nonzero(painted, as_tuple=True)
    assert painted[4:8, 16:20].any()
    assert rows.min() >= 0
    assert columns.min() >= 12
    assert columns.max() < 24
    assert not painted[:, :12].any()


def test_a_picture_has_the_same_codes_in_any_batch(trained: VQAutoencoder, pictures: Tensor) -> None:
    together = trained.encode(pictures)
    assert torch.equal(together[17:18], trained.encode(pictures[17:18]))
    assert torch.equal(together[100:], trained.encode(pictures[100:]))


def test_training_learns(trained: VQAutoencoder, pictures: Tensor) -> None:
    """Far better than the mean picture, on pictures it has not seen; and its own reconstructions have their codes."""
    held_out = pictures[200:]
    found = measure(trained, held_out)
    spread = float((to_input(held_out) - to_input(pictures[:200]).mean(0)).square().mean())
    assert found["mse"] < 0.25 * spread
    assert found["codes_used"] > 0.6
    assert 0.3 * 64 < found["perplexity"] <= 64
    assert found["codes_kept"] > 0.6
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / found["mse"]))


def test_same_seed_same_bytes(pictures: Tensor) -> None:
    state = torch.random.get_rng_state()
    one, two = (train(pictures, BRIEF, **SMALL).fingerprint for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one == two
    assert train(pictures, replace(BRIEF, seed=1), **SMALL).fingerprint != one


def test_a_file_gives_the_tokenizer_back(trained: VQAutoencoder, pictures: Tensor, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "image_tokenizer.safetensors")
    again = load_image_tokenizer(path)
    assert again.fingerprint == trained.fingerprint
    assert (again.codebook_size, again.patch) == (64, 4)
    codes = trained.encode(pictures)
    assert torch.equal(again.encode(pictures), codes)
    assert torch.equal(again.decode(codes, 20, 20), trained.decode(codes, 20, 20))
    assert again.save(tmp_path / "second").read_bytes() == path.read_bytes()


def test_files_that_are_no_tokenizer(trained: VQAutoencoder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(RunError, match="no such file"):
        load_image_tokenizer(tmp_path / "none.safetensors")
    whole = trained.save(tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-40])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("cut.safetensors", "other.safetensors"):
        with pytest.raises(RunError, match=rf"{name}: not a readable image tokenizer"):
            load_image_tokenizer(tmp_path / name)


def wrong_calls() -> dict[str, Callable[[ImageTokenizer], Tensor]]:
    byte = torch.uint8
    return {
        "float32": lambda net: net.encode(torch.zeros(1, 20, 20, 3)),
        r"\[1, 3, 20, 20\]": lambda net: net.encode(torch.zeros(1, 3, 20, 20, dtype=byte)),
        "18x20 pixels do not divide": lambda net: net.encode(torch.zeros(1, 18, 20, 3, dtype=byte)),
        "20x20 pixels are 25 codes": lambda net: net.decode(torch.zeros(1, 24, dtype=torch.int64), 20, 20),
        "codes must be 0 to 63": lambda net: net.decode(torch.full((1, 25), 64), 20, 20),
    }


@pytest.mark.parametrize("line", wrong_calls())
def test_wrong_pictures_and_codes_are_one_line(line: str) -> None:
    with pytest.raises(ValueError, match=line):
        wrong_calls()[line](drawn())


# --------------------------------------------------------------------------- the codebook


def clusters(seed: int = 0) -> Tensor:
    """[400, 3] around 8 corners."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[a, b, c] for a in (0.0, 5.0) for b in (0.0, 5.0) for c in (0.0, 5.0)])
    return corners.repeat(50, 1) + 0.1 * torch.randn(400, 3, generator=generator)


def test_nearest_is_the_smallest_distance() -> None:
    z, codes = torch.randn(50, 3), torch.randn(9, 3)
    assert torch.equal(nearest(z, codes), torch.cdist(z, codes).argmin(1))


def test_k_means_finds_clusters_and_wants_enough_vectors() -> None:
    z = clusters()
    centres = k_means(z, 16, 20, torch.Generator().manual_seed(0))
    assert float((z - centres[nearest(z, centres)]).norm(dim=1).mean()) < 0.6
    with pytest.raises(ValueError, match="500 codes need at least as many patches"):
        k_means(z, 500, 1, torch.Generator())


def test_codes_follow_their_vectors_and_dead_ones_are_revived() -> None:
    z, book, generator = clusters(), Codebook(24, 3, decay=0.5), torch.Generator().manual_seed(0)
    book.start(z, generator)
    book.codes[1:] += 1000
    book.counts_K[1:] = 0
    book.sums_KD[1:] = 0
    book.follow(z, book(z))
    assert torch.allclose(book.codes[0], z.mean(0), atol=2), "the one code that is left follows all vectors"
    for _ in range(10):
        revived = book.revive(z, 0.1, generator)
        for _ in range(5):
            book.follow(z, book(z))
    assert revived < 3
    assert float((z - book.codes[book(z)]).norm(dim=1).mean()) < 0.5
    assert book.revive(z, 0.0, generator) == 0
