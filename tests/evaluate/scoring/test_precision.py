"""Types and sizes of forwards that a device has no memory or no arithmetic for."""

from typing import Any

import numpy as np
import pytest
import torch

from selfcorrect.evaluate.measuring.cell_files import Origin
from selfcorrect.evaluate.report.page import mixed_precision
from selfcorrect.evaluate.scoring import forwards, precision
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.precision import check_device, check_dtype, fast_dtype, held_in
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import WORDS, save_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes",
    ],
)
def test_a_batch_larger_than_memory_is_halved(
    message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and samples are those of a machine with memory; a row that never fits is one line."""
    requests = [(f"<s> the {word} told her", (" she", " he")) for word in WORDS[20:32]]
    prompts, keys = [prompt for prompt, _ in requests], [f"k{i}" for i in range(12)]
    sampling = Sampling(max_new_tokens=4, temperature=1.0, seed=0)
    plain = PackedEngine(tiny_model(), tiny_tokenizer(), pack_tokens=16)
    expected = plain.score(requests), plain.sample(prompts, keys, sampling)
    caplog.clear()
    model, tokenizer = tiny_model(), tiny_tokenizer()
    kind = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
    forward, most = model.forward, [40]

    def limited(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > most[0]:
            raise kind(message)
        return forward(*args, **kwargs)

    engine = PackedEngine(model, tokenizer, pack_tokens=16, batch_tokens=512)
    engine.score(requests)  # trials, whose size does not depend on the batch
    monkeypatch.setattr(model, "forward", limited)
    np.testing.assert_allclose(engine.score(requests), expected[0], atol=1e-4)
    assert engine.batch_tokens <= 64
    lines = [record.message for record in caplog.records if "out of memory" in record.message]
    assert lines and "--batch-tokens" in lines[-1]
    most[0] = 20
    small = PackedEngine(model, tokenizer, pack_tokens=16, batch_tokens=256)
    assert small.sample(prompts, keys, sampling) == expected[1]
    most[0] = 1
    for none_fits in (engine, PackedEngine(model, tokenizer)):
        with pytest.raises(InputError, match="not fit in memory"):
            none_fits.score(requests)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_weights_are_held_as_asked(kind: str, tmp_path: Any) -> None:
    """Rotary frequencies stay float32, log-probabilities move little, small models stay float32."""
    folder = save_model(tmp_path, tiny_model(kind))
    loaded = {dtype: load_model(folder, dtype=dtype) for dtype in ("bfloat16", "float32", "fast")}
    held = {dtype: held_in(model) for dtype, (model, _) in loaded.items()}
    assert held == {"bfloat16": "bfloat16", "float32": "float32", "fast": "float32"}
    half, _ = loaded["bfloat16"]
    rotary = [b for name, b in half.named_buffers() if name.endswith("inv_freq")]
    assert rotary and {b.dtype for b in rotary} == {torch.float32}
    request = [("the doctor said that the nurse", ("she", "he"))]
    scores = [PackedEngine(*loaded[dtype]).score(request)[0] for dtype in ("bfloat16", "float32")]
    assert 0 < np.abs(np.subtract(*scores)).max() < 0.5


def test_a_device_or_type_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda: this machine has no GPU"):
        check_device("cuda")
    with pytest.raises(InputError, match=r"--device tpu: unknown"):
        check_device("tpu")
    assert check_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for dtype, device, words in (
        ("float16", "cpu", "a CPU does not compute in float16"),
        ("4bit", "cpu", "4bit needs a CUDA GPU"),
        ("bfloat16", "cuda", "this GPU does not compute in bfloat16"),
    ):
        with pytest.raises(InputError, match=words):
            check_dtype(dtype, device, "key")
    assert fast_dtype("cuda") == "float32"
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'selfcorrect\[4bit\]'"):
        check_dtype("4bit", "cuda", "key")


@pytest.mark.parametrize(("speed", "words"), [(0.25, "4.0 times as long"), (0.9, ""), (2, "")])
def test_a_cpu_that_is_slow_in_bfloat16_is_named_once(
    speed: float, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_speed_of_bf16", lambda: speed)
    precision._warn_if_slow.cache_clear()
    for dtype in ("bfloat16", "bfloat16", "float32", "auto"):
        check_dtype(dtype, "cpu", "--dtype")
    precision._warn_if_slow.cache_clear()
    assert len(caplog.records) == bool(words)
    assert words in caplog.text


def test_cells_of_another_type_are_not_taken_for_the_same() -> None:
    """Files without a type are older ones of ours, in float32, or another engine's."""
    half, unknown = Origin("w", dtype="bfloat16"), Origin("w")
    recorded = {"weights": "w", "engine": "packed", "tokenizer": None}
    assert half.made({**recorded, "dtype": "bfloat16"})
    assert not half.made({**recorded, "dtype": "float32"}) and not half.made(recorded)
    assert unknown.made({**recorded, "dtype": "float32"}) and unknown.made(recorded)
    assert Origin("w", dtype="float32").made(recorded)
    assert Origin("w", "vllm").made({**recorded, "engine": "vllm"})
    cells = [{"model": "a", "dtype": "float32"}, {"model": "b", "dtype": "float32"}]
    assert mixed_precision(cells) == []
    [sentence] = mixed_precision([*cells, {"model": "b", "dtype": "bfloat16"}])
    assert "bfloat16 (b)" in sentence and "float32 (a, b)" in sentence


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_of_a_bfloat16_model_is_computed_in_float32_piece_by_piece(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().bfloat16()
    head = model.lm_head
    if bias:
        head.bias = torch.nn.Parameter(torch.randn(len(head.weight)).bfloat16())
    hidden = torch.randn(2, 5, head.in_features).bfloat16()
    monkeypatch.setitem(forwards._NUMBERS_CONVERTED, "cpu", 3 * head.in_features)
    assert len(head.weight) % 3  # the last piece is smaller
    expected = torch.nn.functional.linear(
        hidden.float(), head.weight.float(), head.bias.float() if bias else None
    )
    with torch.no_grad(), forwards.float32_head(model):
        logits = head(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert head(hidden).dtype == torch.bfloat16


def test_weights_of_a_gguf_file_are_unpacked(tmp_path) -> None:
    """transformers would keep those of some families packed, where adapters cannot train."""
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    model, _ = load_model(tmp_path / "tiny.gguf", dtype="bfloat16", device="cpu")
    assert held_in(model) == "bfloat16"
    assert not hasattr(model, "hf_quantizer")


def test_a_damaged_gguf_file_is_named(tmp_path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:-4000])
    with pytest.raises(InputError, match=r"cut\.gguf: cannot load .*fetch it again$"):
        load_model(tmp_path / "cut.gguf", device="cpu")
