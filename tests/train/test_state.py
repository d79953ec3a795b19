"""A run that is stopped and resumed is the run that was never stopped; a killed save costs nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety import storage
from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import FormatError, StorageError, UsageError
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer
from moiety.train.state import Latest, RunState, latest_checkpoint, load_state, read_state, save_checkpoint

CONFIG = ModelConfig(
    vocab_size=40,
    d_model=8,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=6),
    d_ff=12,
    moe=MoEConfig(experts=3, experts_per_token=2, d_ff=5, router="sigmoid", selection_bias=True),
    dense_layers=(0,),
)
Pair = tuple[Transformer, torch.optim.AdamW]


def make(seed: int, *, fused: bool = True) -> Pair:
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    named = list(model.named_parameters())
    groups = [
        {
            "params": [parameter for _, parameter in named[start::2]],
            "names": [name for name, _ in named[start::2]],
            "scale": 1.0 + start,
        }
        for start in (0, 1)
    ]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=fused)


def train_step(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """Data and noise from all three generators, so that each of them matters."""
    tokens = torch.randint(0, 40, (2, 7))
    noise = random.random() + float(np.random.standard_normal())
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) * noise
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.blocks[1].feed_forward.selection_bias.add_(0.001 * np.random.rand())


def fingerprint(model: Transformer, optimizer: torch.optim.AdamW) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for kind, value in sorted(optimizer.state[parameter].items()):
                digest.update(f"{name}{kind}{value.dtype}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_twice_is_never_stopped(tmp_path: Path, fused: bool) -> None:
    random.seed(5)
    np.random.seed(5)
    model, optimizer = make(5, fused=fused)
    begun = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    wanted = []
    for _ in range(6):
        train_step(model, optimizer)
        wanted.append(fingerprint(model, optimizer))

    model, optimizer = make(5, fused=fused)
    torch.set_rng_state(begun[0])
    np.random.set_state(begun[1])
    random.setstate(begun[2])
    found = []
    for step in range(6):
        if step in (2, 4):
            optimizer.param_groups[0]["lr"] = 0.01
            path = save_checkpoint(
                tmp_path, model, optimizer, RunState(step=step, seconds=0.1 + step, run={"a": [1]})
            )
            model, optimizer = make(step + 70, fused=fused)
            optimizer.param_groups[0]["lr"] = 7.0
            torch.rand(3), np.random.rand(3), random.random()
            assert load_state(path, model, optimizer) == RunState(
                step=step, seconds=0.1 + step, run={"a": [1]}
            )
            assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
            assert fingerprint(model, optimizer) == found[-1]
        train_step(model, optimizer)
        found.append(fingerprint(model, optimizer))
    assert found == wanted and len(set(wanted)) == 6


def test_moments_keep_their_dtype_under_bfloat16_weights(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train_step(model, optimizer)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    wanted = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    path = save_checkpoint(tmp_path, model, optimizer, RunState(step=1))
    load_state(path, model, optimizer)
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            assert value.dtype == torch.float32 and torch.equal(value, wanted[id(parameter)][kind])


def test_before_the_first_step_and_values_that_are_not_finite(tmp_path: Path) -> None:
    model, optimizer = make(0)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    state = RunState(last_evaluation={"loss": math.nan}, best_evaluation={"loss": math.inf})
    path = save_checkpoint(tmp_path, model, optimizer, state)
    other, other_optimizer = make(1)
    train_step(other, other_optimizer)
    back = load_state(path, other, other_optimizer)
    assert back.best_evaluation == {"loss": math.inf} and not other_optimizer.state
    assert back.last_evaluation and math.isnan(back.last_evaluation["loss"])
    assert torch.isnan(other.norm.weight[0]) and torch.isfinite(other.norm.weight[1:]).all()


def test_a_checkpoint_is_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["to be or not to be"], 260)
    config = dataclasses.replace(CONFIG, vocab_size=300)
    model = Transformer(config)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": list(named.values()), "names": list(named)}])
    path = save_checkpoint(tmp_path, model, optimizer, RunState(step=7), tokenizer=tokenizer)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert read_state(path).step == 7
    with pytest.raises(UsageError, match="another model"):
        load_state(path, *make(0))


def test_old_ones_go_after_the_new_one_is_there(tmp_path: Path) -> None:
    model, optimizer = make(0)
    parent = tmp_path / "checkpoints"
    assert latest_checkpoint(tmp_path) == Latest(None, ())
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, model, optimizer, RunState(step=step), keep_last=2)
    assert sorted(one.name for one in parent.iterdir()) == ["step-00000003", "step-00000004"]
    save_checkpoint(tmp_path, model, optimizer, RunState(step=2), keep_last=1)
    assert len(list(parent.iterdir())) == 3  # later steps are never removed
    (parent / "step-00000003" / "notes.txt").write_text("mine")
    save_checkpoint(tmp_path, model, optimizer, RunState(step=5), keep_last=1)
    assert sorted(one.name for one in parent.iterdir()) == ["step-00000003", "step-00000005"]
    with pytest.raises(UsageError, match="keep_last"):
        save_checkpoint(tmp_path, model, optimizer, RunState(step=6), keep_last=0)
    with pytest.raises(UsageError, match="JSON"):
        save_checkpoint(tmp_path, model, optimizer, RunState(step=6, run={"a": {1, 2}}))
    (parent / "step-00000006").mkdir()
    (parent / "step-00000006" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="no manifest"):
        save_checkpoint(tmp_path, model, optimizer, RunState(step=6), keep_last=1)
    (parent / "step-00000005" / "manifest.json").write_text("{")
    save_checkpoint(tmp_path, model, optimizer, RunState(step=5), keep_last=1)
    assert len([one for one in parent.iterdir() if "step-00000005.damaged-" in one.name]) == 1
    latest = latest_checkpoint(tmp_path)
    assert latest.path == parent / "step-00000005"
    assert len(latest.damaged) == 1 and "step-00000006" in latest.damaged[0]


def test_damage_is_reported_and_passed_over(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train_step(model, optimizer)
    good = save_checkpoint(tmp_path, model, optimizer, RunState(step=1), keep_last=9)
    bad = save_checkpoint(tmp_path, model, optimizer, RunState(step=2), keep_last=9)
    files = sorted(path for path in bad.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        whole = file.read_bytes()
        flips = [(random.randrange(len(whole)), 1 << random.randrange(8)) for _ in range(30)]
        for byte, bit in flips:
            damaged = bytearray(whole)
            damaged[byte] ^= bit
            file.write_bytes(damaged)
            found = latest_checkpoint(tmp_path)
            assert found.path == good and len(found.damaged) == 1 and file.name in found.damaged[0]
        with pytest.raises(FormatError):
            load_state(bad, *make(3))
        file.write_bytes(whole[: len(whole) // 2])
        assert latest_checkpoint(tmp_path).path == good
        file.unlink()
        assert latest_checkpoint(tmp_path).path == good
        file.write_bytes(whole)
    assert latest_checkpoint(tmp_path) == Latest(bad, ())
    train_step(model, optimizer)
    other = save_checkpoint(tmp_path / "other", model, optimizer, RunState(step=2))
    for name in ("model.safetensors", "state/optimizer.safetensors"):  # whole files of another step
        kept = (bad / name).read_bytes()
        assert (other / name).stat().st_size == len(kept)
        shutil.copy(other / name, bad / name)
        found = latest_checkpoint(tmp_path)
        assert found.path == good and name in found.damaged[0]
        (bad / name).write_bytes(kept)


def test_other_groups_and_other_folders_are_refused(tmp_path: Path) -> None:
    model, optimizer = make(0)
    path = save_checkpoint(tmp_path, model, optimizer, RunState(step=1))
    named = dict(model.named_parameters())
    other = torch.optim.AdamW([{"params": list(named.values()), "names": list(named)}])
    with pytest.raises(UsageError, match="optimizer groups"):
        load_state(path, model, other)
    model.save(tmp_path / "model")
    with pytest.raises(FormatError, match="not a checkpoint of a run"):
        load_state(tmp_path / "model", model, optimizer)
    with pytest.raises(FormatError, match="not a checkpoint of a run"):
        read_state(tmp_path / "nowhere")


def test_killed_a_hundred_times(tmp_path: Path) -> None:
    """SIGKILL at random times in a loop of saves: what is left is whole and one of the two known states."""
    states = [make(0), make(1)]
    for model, optimizer in states:
        train_step(model, optimizer)
    known = [fingerprint(*state) for state in states]
    save_checkpoint(tmp_path, *states[0], RunState(step=0))
    began = time.perf_counter()  # of a child's save, which starts with everything copied on write
    child = os.fork()
    if child == 0:
        save_checkpoint(tmp_path, *states[0], RunState(step=2))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    one_save_s = time.perf_counter() - began
    interrupted, steps = 0, set()
    for number in range(100):
        child = os.fork()
        if child == 0:
            for step in range(1, 1000):
                save_checkpoint(tmp_path, *states[step % 2], RunState(step=2 + step), keep_last=2)
            os._exit(0)
        time.sleep(random.random() * (1 + number % 8) * one_save_s)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        interrupted += any(one.name.startswith(".") for one in (tmp_path / "checkpoints").iterdir())
        path, damaged = latest_checkpoint(tmp_path)
        assert path is not None and damaged == ()
        found = make(9)
        state = load_state(path, *found)
        assert fingerprint(*found) == known[state.step % 2] and path.name.endswith(str(state.step))
        steps.add(state.step)
        if number % 10 == 9 and len(steps) == 1:
            one_save_s *= 2  # the machine has become slower
    assert interrupted > 20 and len(steps) > 1
    path = save_checkpoint(tmp_path, *states[1], RunState(step=5001), keep_last=1)
    assert [one.name for one in (tmp_path / "checkpoints").iterdir()] == [path.name]
    assert set(storage.verify(path)) > {"state/rng.json", "model.safetensors"}
