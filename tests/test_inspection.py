"""``gradwatch.inspect``: what weights tell at rest, from models and hostile files."""

import collections
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradwatch
from gradwatch import cli, inspection
from gradwatch.checkpoint import CheckpointError, read_weights
from gradwatch.inspection import inspect
from testbed import reference
from testbed.models import Tagger

# ---- what is computed


@pytest.mark.parametrize(("rho", "gain"), [(0.9, 2.7e-5), (1.1, 1.4e4)])
def test_the_gain_over_a_hundred_steps(rho, gain):
    rnn = nn.RNN(2, 24)
    gradwatch.init.orthogonal_(rnn, rho)
    [found] = inspect(rnn).streams
    assert math.isclose(found.rate, rho, rel_tol=1e-5)
    assert math.isclose(found.gain, gain, rel_tol=2e-2)
    assert found.verdict == ("fades" if rho < 1 else "grows")
    assert found.remedy.name == "init.orthogonal_"
    assert inspect(rnn, steps=5).ok


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("size", [6, 40])
def test_the_rate_at_rest_is_that_of_autograd(kind, size):
    torch.manual_seed(0)
    cell = kind(3, size).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(3.0)
    x = torch.zeros(1, 3, dtype=torch.float64)

    def step(state):
        if kind is nn.GRUCell:
            return cell(x, state[None])[0]
        return torch.cat(cell(x, (state[None, :size], state[None, size:])), 1)[0]

    start = torch.zeros(size * (1 + (kind is nn.LSTMCell)), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(step, start)
    [found] = inspect(cell).streams
    assert math.isclose(found.rate, reference.spectral_radius(jacobian), rel_tol=1e-3)


def test_every_gate_and_the_bias_that_keeps():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 16, 2, bidirectional=True)
    gradwatch.init.forget_bias_(lstm, 2.0)
    found = inspect(lstm)
    assert [s.stream for s in found.streams] == [
        "lstm.l0", "lstm.l0_reverse", "lstm.l1", "lstm.l1_reverse"
    ]  # fmt: skip
    for stream, name in zip(found.streams, ("l0", "l0_reverse"), strict=False):
        blocks = getattr(lstm, f"weight_hh_{name}").detach().chunk(4)
        assert [g.gate for g in stream.gates] == ["i", "f", "g", "o"]
        for gate, block in zip(stream.gates, blocks, strict=True):
            assert math.isclose(
                gate.rho, reference.spectral_radius(block), rel_tol=1e-4
            )
            assert math.isclose(
                gate.sigma_max, reference.sigma_max(block), rel_tol=1e-4
            )
            off = reference.orthogonality(block)
            assert math.isclose(gate.orthogonality, off, rel_tol=1e-3)
        assert stream.forget_bias == 2.0
        assert math.isclose(stream.timescale, 1 + math.exp(2), rel_tol=1e-6)


def test_a_model_and_its_state_dict_agree():
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(3, 16, 2, proj_size=5), 5)
    one, two = inspect(model), inspect(model.state_dict())
    assert repr(one) == repr(two)


def test_chrono_and_orthogonal_nets_are_left_in_peace():
    lstm, rnn = nn.LSTM(3, 64), nn.RNN(3, 64)
    gradwatch.init.chrono_(lstm, 100)
    gradwatch.init.orthogonal_(rnn)
    assert inspect(lstm).ok and inspect(rnn).ok
    assert "nothing to do" in inspect(rnn).verdict


def test_the_remedy_cures_what_the_verdict_found():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.GRU(3, 32), "b": nn.LSTM(3, 32), "c": nn.RNN(3, 32)})
    before = inspect(model)
    assert [s.verdict for s in before.streams] == ["fades"] * 3
    for line in repr(before).splitlines():
        if line.strip().startswith("gradwatch."):
            exec(line.strip(), {"gradwatch": gradwatch, "model": model})
    assert inspect(model).ok


def test_parametrised_weights_are_computed_and_left_alone():
    model = Tagger(nn.LSTM(3, 12), 12)
    gradwatch.parametrize.orthogonal(model)
    torch.nn.utils.parametrizations.spectral_norm(model.rnn, "weight_ih_l0")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    [found] = inspect(model).streams
    assert all(g.orthogonality < 1e-5 for g in found.gates)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    told = inspect(model.state_dict())
    assert not told.streams and "parametrization" in told.left_out["rnn.weight_hh_l0"]
    assert "1 could not be read" in told.verdict


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Linear(2, 2), "contains no nn.RNN"),
        ({}, "no recurrent weights found"),
        ({"a.weight": torch.zeros(2, 2)}, "no recurrent weights found"),
    ],
)
def test_nothing_to_look_at_is_an_error(given, words):
    with pytest.raises(ValueError, match=words):
        inspect(given)
    with pytest.raises(ValueError, match="steps is 0"):
        inspect(nn.RNN(1, 1), steps=0)
    with pytest.raises(TypeError, match="got int; expected a module"):
        inspect(3)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight_hh_l0": torch.zeros(7, 3)}, "of no nn.RNN"),
        ({"weight_hh_l0": torch.zeros(3)}, "two dimensions"),
        ({"weight_hh_l0": torch.zeros(0, 0)}, "two dimensions"),
        ({"weight_hh_l0": torch.zeros(9, 3, dtype=torch.int64)}, "torch.int64"),
        ({"weight_hh_l0": torch.zeros(9, 3, device="meta")}, "device meta"),
        ({"weight_hh_l0": torch.zeros(9, 3).to_sparse()}, "sparse"),
        ({"weight_hh_l0": torch.zeros(9, 3, dtype=torch.complex64)}, "complex64"),
        ({"weight_hh_l0": torch.zeros(1).expand(4096 * 3, 4096)}, "and holds 1"),
        ({"weight_hh_l0": torch.zeros(1).expand(10**6, 10**6)}, "above 4,096"),
        (
            {"weight_hh_l0": torch.zeros(9, 3), "bias_ih_l0": torch.zeros(5)},
            "bias_ih has shape",
        ),
        (
            {"weight_hh_l0": torch.zeros(16, 4), "weight_hr_l0": torch.tensor(1.0)},
            "weight_hr has shape ()",
        ),
        (
            {"weight_hh_l0": torch.zeros(16, 4), "weight_hr_l0": torch.zeros(3, 0)},
            "weight_hr has shape (3, 0)",
        ),
        ({"weight_hh_l0": torch.zeros(9, 3).to(torch.float8_e5m2)}, "torch.float8"),
        (
            {"weight_hh_l0": torch.nested.nested_tensor([torch.zeros(3, 3)])},
            "is nested",
        ),
    ],
)  # fmt: skip
def test_weights_that_are_not_pytorchs_are_left_out_with_the_reason(weights, words):
    good = {f"good.{k}": v for k, v in nn.GRU(2, 4).state_dict().items()}
    found = inspect({**{f"bad.{k}": v for k, v in weights.items()}, **good})
    assert [s.stream for s in found.streams] == ["good.l0"]
    assert words in found.left_out["bad.l0"]
    assert words in repr(found) and not found.ok


# ---- checkpoints


def state(prefix="", model=None):
    torch.manual_seed(0)
    model = model or Tagger(nn.LSTM(3, 8, 2), 8)
    return {prefix + k: v for k, v in model.state_dict().items()}


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def safe(path):
    save_file(state(), path)
    return path


def broken_values():
    weights = state()
    weights["rnn.weight_hh_l1"][0, 0] = math.nan
    return weights


def sharded(folder, save, index, name):
    weights = state()
    names = sorted(weights)
    parts = {name.format(1): names[:4], name.format(2): names[4:]}
    for file, own in parts.items():
        save({k: weights[k] for k in own}, folder / file)
    where = {k: file for file, own in parts.items() for k in own}
    (folder / index).write_text(json.dumps({"weight_map": where}))
    return folder / index


GOOD = {
    "plain": lambda d: saved(d / "a.pt", state()),
    "old format": lambda d: saved(
        d / "a.pt", state(), _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda d: safe(d / "a.safetensors"),
    "shards of safetensors": lambda d: sharded(
        d, save_file, "model.safetensors.index.json", "model-{}.safetensors"
    ),
    "shards of torch.save": lambda d: sharded(
        d, torch.save, "pytorch_model.bin.index.json", "pytorch_model-{}.bin"
    ),
    "a folder": lambda d: sharded(
        d, save_file, "model.safetensors.index.json", "model-{}.safetensors"
    ).parent,
    "nested": lambda d: saved(
        d / "a.ckpt",
        {"epoch": 3, "state_dict": state("net."), "optimizer_states": [{"state": {}}]},
    ),
    "nested deep": lambda d: saved(d / "a.pt", {"x": {"model": {"ema": state("a.")}}}),
    "compiled and DDP": lambda d: saved(d / "a.pt", state("_orig_mod.module.")),
    "half precision": lambda d: saved(
        d / "a.pt", {k: v.bfloat16() for k, v in state().items()}
    ),
    "NaN": lambda d: saved(d / "a.pt", broken_values()),
    "two models": lambda d: saved(d / "a.pt", {"g": state(), "d": state()}),
    "no suffix": lambda d: saved(d / "weights", state()),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_a_checkpoint_gets_its_verdict(kind, tmp_path, capsys):
    path = GOOD[kind](tmp_path)
    assert cli.main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    names = {
        "nested": ("net.rnn.l0", "net.rnn.l1"),
        "nested deep": ("a.rnn.l0", "a.rnn.l1"),
        "two models": ("g.rnn.l0", "d.rnn.l1"),
    }.get(kind, ("rnn.l0", "rnn.l1"))
    assert not err
    assert all(f"\n{name} " in out for name in names)
    assert "over 100 steps:" in out
    assert ("1 with NaN or Inf" in out) == (kind == "NaN")


def with_attribute(weight):
    weight = nn.Parameter(weight.clone())
    weight.mark = "kept"
    return weight


KINDS_OF_TENSORS = {
    "as they are": lambda w: w,
    "parameters": nn.Parameter,
    "parameters with an attribute": with_attribute,
    "transposed": lambda w: w.t().contiguous().t(),
    "in the middle of another": lambda w: torch.cat([w, w, w]).chunk(3)[1],
    "every other number": lambda w: torch.stack([w, -w], -1)[..., 0],
    "double": lambda w: w.double(),
    "half": lambda w: w.half(),
    "bfloat16": lambda w: w.bfloat16(),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_TENSORS)
def test_what_is_read_is_what_was_saved(kind, old, tmp_path):
    torch.manual_seed(0)
    model = nn.LSTM(3, 8, 2, proj_size=5)
    weights = {
        name: KINDS_OF_TENSORS[kind](w) for name, w in model.state_dict().items()
    }
    beside = {
        "epoch": 3,
        "loss": numpy.float64(0.5),
        "seen": {1, 2},
        "raw": b"abc",
        "buffer": bytearray(b"abc"),
        "count": collections.Counter("aab"),
        "groups": collections.defaultdict(list, a=[1]),
        "number": 1 + 2j,
        "large": 2**70,
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "random": torch.get_rng_state(),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        ("a", "tuple"): {7: "a key that is no text"},
    }
    path = saved(
        tmp_path / "a.pt",
        {**beside, "model": weights},
        _use_new_zipfile_serialization=not old,
    )
    found = read_weights(path)
    assert set(found) == {n for n in weights if "hh" in n or "hr" in n or "ih" in n}
    for name, weight in found.items():
        assert weight.dtype == weights[name].dtype
        assert torch.equal(weight, weights[name])


def test_what_a_checkpoint_of_many_tensors_takes_is_granted(tmp_path):
    names = [f"l{i}.weight_hh" for i in range(2000)]
    optimizer = {i: {"step": 1.0, "avg": torch.ones(1)} for i in range(2000)}
    history = [{"loss": 0.5 + i, "step": i} for i in range(5000)]
    weights = {name: torch.zeros(1, 1) for name in names}
    whole = {"model": weights, "optimizer": {"state": optimizer}, "log": history}
    assert len(read_weights(saved(tmp_path / "a.pt", whole))) == 2000


def rewritten(path, change=lambda name, data: data):
    """The same archive as another tool writes it: its numbers are not aligned."""
    with zipfile.ZipFile(path) as archive:
        content = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/odd", b"123")
        for name, data in content.items():
            archive.writestr(name, change(name.partition("/")[2], data))
    return path


def test_an_archive_of_another_tool_and_of_another_machine(tmp_path):
    weights = {"weight_hh_l0": torch.randn(16, 4, dtype=torch.float64)}
    path = rewritten(saved(tmp_path / "a.pt", weights))
    assert torch.equal(read_weights(path)["weight_hh_l0"], weights["weight_hh_l0"])

    def other(name, data):
        if name == "byteorder":
            return b"big" if sys.byteorder == "little" else b"little"
        swapped = numpy.frombuffer(data, "i8").byteswap() if "data/" in name else data
        return bytes(swapped) if name == "data/0" else data

    path = rewritten(path, other)
    assert torch.equal(read_weights(path)["weight_hh_l0"], weights["weight_hh_l0"])
    path.write_bytes(b"something before" + path.read_bytes())
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        read_weights(path)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(9, 3).to_sparse(), "sparse or quantised"),
        (torch.zeros(9, 3).to_sparse_csr(), "sparse or quantised"),
        (torch.zeros(9, 3, device="meta"), "holds no values"),
        (torch.zeros(9, 3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(9, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(9, 3).to(torch.float8_e5m2), "float8"),
    ],
)
def test_a_saved_tensor_of_another_kind_is_left_out_with_the_reason(
    weight, words, tmp_path
):
    path = saved(tmp_path / "a.pt", {"weight_hh_l0": weight})
    [reason] = inspect(path).left_out.values()
    assert words in reason


class Evil:
    """Runs code when it is unpickled, if it is let."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def evil(folder):
    return Evil(f"touch {folder / 'ran'}")


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def whole_module(folder):
    return saved(folder / "a.pt", Tagger(nn.RNN(2, 3), 3))


def bomb(folder):
    """A small archive that unpacks to 300 MB of data.pkl."""
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(300):
                entry.write(bytes(2**20))
        archive.writestr("a/version", "3\n")
    return folder / "a.pt"


def overlapping(folder):
    """Two entries of the central directory that name the same bytes."""
    saved(folder / "a.pt", state())
    data = (folder / "a.pt").read_bytes()
    with zipfile.ZipFile(folder / "b.pt", "w") as archive:
        archive.writestr("a/data.pkl", data)
        info = archive.infolist()[0]
        for i in range(50):
            twin = zipfile.ZipInfo(f"a/data/{i}")
            twin.header_offset = info.header_offset
            twin.file_size = twin.compress_size = info.file_size
            twin.CRC = info.CRC
            archive.filelist.append(twin)
    return folder / "b.pt"


def laughs(folder):
    """A billion mappings out of thirty that hold each other."""
    value = {"weight_hh_l0": torch.zeros(3, 3)}
    for _ in range(30):
        value = {"a": value, "b": value}
    return saved(folder / "a.pt", value)


def raw(folder, data):
    (folder / "a.pt").write_bytes(data)
    return folder / "a.pt"


def huge_header(folder):
    header = json.dumps(
        {
            "weight_hh_l0": {
                "dtype": "F32",
                "shape": [10**6, 10**6],
                "data_offsets": [0, 4],
            }
        }
    ).encode()
    return raw(folder, len(header).to_bytes(8, "little") + header + bytes(4))


GREEDY = (
    b"\x80\x02cbuiltins\nbytearray\nq\x00\x8a\x05"
    + (3 * 2**30).to_bytes(5, "little")
    + b"\x85Rq\x01."
)


def hungry(folder):
    with zipfile.ZipFile(folder / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", GREEDY)
        archive.writestr("a/version", "3\n")
    return folder / "a.pt"


def outside(folder):
    saved(folder / "secret.bin", state())
    inner = folder / "inner"
    inner.mkdir()
    index = inner / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"weight_hh_l0": "../secret.bin"}}))
    return index


def circle(folder):
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"weight_hh_l0": index.name}}))
    return index


def folder_of_dcp(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(evil(folder)))
    return folder


def pipe(folder):
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


BAD = {
    "a pickle that runs code": (
        lambda d: saved(d / "a.pt", {"weight_hh_l0": evil(d)}),
        "wants to run posix.system",
    ),
    "the same in the old format": (
        lambda d: raw(d, pickle.dumps(evil(d), protocol=2)), "wants to run posix.system"
    ),
    "a whole module": (whole_module, "wants to run testbed.models.Tagger"),
    "a zip bomb": (bomb, "declares more data than it contains"),
    "overlapping entries": (overlapping, "declares more data than it contains"),
    "cut off": (lambda d: cut(saved(d / "a.pt", state())), "broken or cut off"),
    "cut off, old format": (
        lambda d: cut(saved(d / "a.pt", state(), _use_new_zipfile_serialization=False)),
        "cannot be read as weights",
    ),
    "cut off safetensors": (
        lambda d: cut(GOOD["safetensors"](d), 0.9), "broken or cut off"
    ),
    "a header that claims 10^12 numbers": (huge_header, "broken or cut off"),
    "empty": (lambda d: raw(d, b""), "is empty"),
    "text": (lambda d: raw(d, b"hello, world, this is text"), "is no checkpoint"),
    "four bytes of a zip": (lambda d: raw(d, b"PK\3\4"), "broken or cut off"),
    "JSON": (lambda d: raw(d, b'{"a": 1}'), "is no index of shards"),
    "deep JSON": (lambda d: raw(d, b'{"a":' * 10**5), "is no index of shards"),
    "a shard outside": (outside, "not beside it"),
    "an index that names itself": (circle, "is an index itself"),
    "the same without a suffix": (
        lambda d: raw(d, b'{"weight_map": {"weight_hh_l0": "a.pt"}}'),
        "is an index itself",
    ),
    "a bytearray of 3 GB": (hungry, "would allocate far more memory"),
    "the same in the old format ": (
        lambda d: raw(d, GREEDY), "would allocate far more memory"
    ),
    "a missing shard": (
        lambda d: raw(d, b'{"weight_map": {"weight_hh_l0": "gone.bin"}}'),
        "not beside it",
    ),
    "torch.distributed": (folder_of_dcp, "dcp_to_torch"),
    "TorchScript": (
        lambda d: (torch.jit.script(nn.LSTM(2, 3)).save(d / "a.pt"), d / "a.pt")[1],
        "TorchScript",
    ),
    "an empty folder": (lambda d: d, "holds none of"),
    "missing": (lambda d: d / "gone.pt", "does not exist"),
    "a pipe": (pipe, "not a regular file"),
    "no recurrent weights": (
        lambda d: saved(d / "a.pt", nn.Linear(2, 2).state_dict()),
        "no recurrent weights",
    ),
    "a list": (lambda d: saved(d / "a.pt", [1, 2]), "no recurrent weights"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", BAD)
def test_a_hostile_or_broken_file_is_one_sentence(kind, tmp_path, capsys):
    make, words = BAD[kind]
    path = make(tmp_path)
    assert cli.main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("gradwatch: ") and err.count("\n") == 1, err
    assert words in err and len(err) < 500, err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_stride_trick_is_seen_before_any_arithmetic(old, tmp_path, capsys):
    trick = {"enc.weight_hh_l0": torch.zeros(1).expand(10**6, 10**6)}
    small = {"rnn.weight_hh_l0": torch.zeros(1).expand(4096, 4096)}
    path = saved(
        tmp_path / "a.pt", {**trick, **small}, _use_new_zipfile_serialization=not old
    )
    assert cli.main(["inspect", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert "hidden size 1,000,000 is above 4,096" in out
    assert "claims 16,777,216 numbers and holds 1" in out


def test_mappings_that_hold_each_other_are_looked_at_once(tmp_path):
    assert not read_weights(laughs(tmp_path))  # deeper than any checkpoint


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    name = "a\x1b[31m\r\nevil"
    path = saved(tmp_path / "a.pt", {f"{name}.weight_hh_l0": torch.eye(3)})
    assert cli.main(["inspect", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out and "\r" not in out and "a\\x1b[31m\\r\\nevil" in out


def test_a_large_sparse_file_is_refused_at_once(tmp_path):
    path = tmp_path / "a.pt"
    saved(path, state())
    with path.open("r+b") as opened:
        opened.truncate(50 * 2**30)
    with pytest.raises(CheckpointError, match="broken or cut off"):
        read_weights(path)


def test_safetensors_missing_is_said(tmp_path, monkeypatch):
    path = GOOD["safetensors"](tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_weights(path)


def test_weights_under_many_names_are_looked_at_once(tmp_path, monkeypatch):
    calls = []
    plain = inspection._inspected

    def counted(*args):
        calls.append(0)
        return plain(*args)

    monkeypatch.setattr(inspection, "_inspected", counted)
    weight = torch.randn(64, 16)
    path = saved(tmp_path / "a.pt", {f"n{i}.weight_hh_l0": weight for i in range(50)})
    found = inspect(path)
    assert len(found.streams) == 50 and len(calls) == 1
    assert found.streams[7].remedy.args["streams"] == ["n7.l0"]


def test_a_file_gets_so_much_work_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_WORK", 2 * 4 * 16**3)
    weights = {f"n{i}.weight_hh_l0": torch.randn(64, 16) for i in range(5)}
    found = inspect(saved(tmp_path / "a.pt", weights))
    assert len(found.streams) == 2 and len(found.left_out) == 3
    assert "too much work" in found.left_out["n4.l0"]
    assert len(inspect(weights).streams) == 5


def test_products_that_overflow_are_broken_and_long_gains_are_right():
    weights = {
        "weight_hh_l0": torch.full((16, 2), 1e30),
        "weight_hr_l0": torch.full((2, 4), 1e30),
    }
    [found] = inspect(weights).streams
    assert found.verdict == "broken" and found.remedy is None
    half = {"weight_hh_l0": 0.5 * torch.eye(3)}
    assert inspect(half, steps=10**9).streams[0].gain == 0.0
    twice = {"weight_hh_l0": 2 * torch.eye(3)}
    assert inspect(twice, steps=10**9).streams[0].gain == math.inf
    for steps in (10**400, 1.5, None):
        with pytest.raises(ValueError, match="expected 1 to 1,000,000,000"):
            inspect(half, steps=steps)


# ---- files that ask for memory


def named(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def number(value):
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + data


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def called(name, *args):
    """A call of what is named, with opcodes that push the arguments."""
    return named(name) + b"(" + b"".join(args) + b"tR"


def stored(count, kind="torch FloatStorage", more=b""):
    """A storage of so many numbers, of which the file has four."""
    parts = (text("storage"), named(kind), text("0"), text("cpu"), number(count))
    return b"(" + b"".join(parts) + more + b"tQ"


def tensor(size, stride, count=4, **more):
    shape = [b"(" + b"".join(map(number, own)) + b"t" for own in (size, stride)]
    hooks = called("collections OrderedDict")
    return called(
        "torch._utils _rebuild_tensor_v2",
        stored(count, **more),
        number(0),
        *shape,
        b"\x89",
        hooks,
    )


def under(value, key="weight_hh_l0"):
    return b"}" + text(key) + value + b"s."


def again(value, times, call):
    """A value that is remembered once, and used in so many calls."""
    return value + b"q\x00(" + times * call + b"t."


HUGE = 10**10
ONES = b"](" + 50_000 * b"K\x01" + b"e"
PICKLES = {
    "a bytearray by its name in Python 2": called(
        "__builtin__ bytearray", number(HUGE)
    ),
    "a bytearray": called("builtins bytearray", number(HUGE)),
    "bytes": called("builtins bytes", number(HUGE)),
    "bytes by their name in Python 2": called("__builtin__ bytes", number(HUGE)),
    "a range in a list": called(
        "builtins list", called("builtins range", number(10**8))
    ),
    "a storage": called("torch.storage UntypedStorage", number(HUGE)),
    "a new storage": named("torch.storage UntypedStorage") + number(HUGE) + b"\x85\x81",
    "a tensor by its class": called("torch Tensor", number(HUGE)),
    "a tensor by an old class": called("torch FloatTensor", number(HUGE)),
    "a parameter": called("torch.nn.parameter Parameter", number(HUGE)),
    "a product": called("operator mul", b"](K\x00e", number(10**9)),
    "a text multiplied": called("operator mul", text("a"), number(HUGE)),
    "numpy's zeros": called("numpy zeros", number(HUGE)),
    "a quantised tensor": called(
        "torch._utils _rebuild_qtensor",
        stored(4, "torch QUInt8Storage"),
        number(0),
        number(HUGE) + b"\x85",
        number(1) + b"\x85",
        b"(" + named("torch per_tensor_affine") + b"G?\xf0\0\0\0\0\0\0K\x00t",
        b"\x89",
        called("collections OrderedDict"),
    ),
    "a tensor larger than its storage": tensor([HUGE], [1]),
    "a storage larger than its data": tensor([HUGE], [1], count=HUGE),
    "a long stride": tensor([2, 2], [HUGE, 1]),
    "an offset beyond": tensor([2, 2], [2**62, 2**62]),
    "a stride below 0": tensor([2, 2], [-1, 1]),
    "a tensor of 200,000 dimensions": tensor([1], [1]).replace(
        number(1) + b"t", 200_000 * b"K\x01" + b"t"
    ),
    "one number for all, as another type": called(
        "torch._utils _rebuild_device_tensor_from_cpu_tensor",
        tensor([10**5, 10**5], [0, 0]),
        named("torch float64"),
        text("cpu"),
        b"\x89",
    ),
    "one number for all, quantised": called(
        "torch._utils _rebuild_nested_tensor",
        tensor([10**5, 10**5], [0, 0]),
        tensor([10**5], [0]),
        tensor([10**5], [0]),
        tensor([10**5], [0]),
    ),
}
"""Name -> a value that takes more memory than its file; the weight of a layer."""
WHOLE = {
    "lists in sets": again(ONES, 2000, named("builtins set") + b"h\0\x85R"),
    "sets by their name in Python 2": again(
        ONES, 2000, named("__builtin__ set") + b"h\0\x85R"
    ),
    "lists in sizes": again(ONES, 2000, named("torch Size") + b"h\0\x85R"),
    "lists counted": again(ONES, 2000, named("collections Counter") + b"h\0\x85R"),
    "lists of pairs": again(
        b"](" + 50_000 * b"X\1\0\0\0aK\1\x86" + b"e",
        2000,
        named("collections OrderedDict") + b"h\0\x85R",
    ),
    "bytes encoded": again(
        text("a" * 10**6),
        5000,
        named("_codecs encode") + b"h\0" + text("utf8") + b"\x86R",
    ),
    "bytes copied": again(
        text("a" * 10**6),
        5000,
        named("__builtin__ bytearray") + b"h\0" + text("latin1") + b"\x86R",
    ),
    "mappings": b"(" + 2**19 * b"}" + b"t.",
    "lists": b"(" + 2**19 * b"]" + b"t.",
    "marks": 2**19 * b"(" + b".",
    "a memo": b"N" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(300_000)),
    "tuples of tuples": b")" + 2**19 * b"\x85" + b".",
    "a key of tuples": under(
        text("a" * 2 * 10**6) + b"}" + b")" + 200_000 * b"\x85" + b"Ns\x86"
    ),
    "a key that doubles": under(b"})q\x00" + 64 * b"h\x00\x86q\x00" + b"Ns"),
    "a long name on the way to many": under(
        b"}(" + b"".join(text(f"{i}") + b"}" for i in range(40_000)) + b"u",
        "a" * 8 * 2**20,
    ),
    "bytes of a length that lies": b"\x8e" + (2**40).to_bytes(8, "little") + b"a.",
    "a bytearray of a length that lies": b"\x96" + (2**33).to_bytes(8, "little") + b"a",
    "a text of a length that lies": b"X" + (2**32 - 1).to_bytes(4, "little") + b"a.",
    "a place in the memo that is far off": b"Nr" + (2**32 - 1).to_bytes(4, "little"),
    "sets of a later protocol": 2**19 * b"\x8f" + b".",
    "one tensor under many names": tensor([2, 2], [2, 1])
    + b"q\x00}("
    + b"".join(text(f"{i}.weight_hh") + b"h\0" for i in range(50_000))
    + b"u.",
}  # fmt: skip
"""Name -> a pickle that takes more memory than its file."""


def archive(path, data, name="a/data.pkl"):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(name, b"\x80\x02" + data)
        opened.writestr("a/data/0", bytes(16))
        opened.writestr("a/version", "3\n")


def old_format(path, data):
    start = [pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]
    keys = pickle.dumps(["0"], protocol=2)
    content = (4).to_bytes(8, "little") + bytes(16)
    old = data.replace(b"tQ", b"NtQ")  # a storage had one part more
    path.write_bytes(b"".join(start) + b"\x80\x02" + old + keys + content)


def crowded(path, count):
    """A zip file of many entries, each of which takes more in memory."""
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/version", b"3\n")
        opened.filelist += count * opened.filelist


def encrypted(path):
    archive(path, b"}.")
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\1")
    )


OTHERS = {
    "a name in capitals": lambda p: archive(
        p, PICKLES["a bytearray"] + b".", "a/DATA.PKL"
    ),
    "a crowded zip file": lambda p: crowded(p, 50_000),
    "a zip file that is too crowded": lambda p: crowded(p, 180_000),
    "an encrypted zip file": encrypted,
    "an index of lists": lambda p: p.write_bytes(
        b'{"weight_map":{},"a":[' + 4 * 2**20 * b"[]," + b"1]}"
    ),
    "a long header of safetensors": lambda p: p.write_bytes(
        (20 * 2**20).to_bytes(8, "little") + b'{"a":[' + 20 * 2**20 * b"[]," + b"1]}"
    ),
    "a storage that is given twice": lambda p: old_format(
        p, under(tensor([HUGE], [1], count=HUGE))
    ),
}
"""Name -> what writes a file that takes more memory than it has."""
MEASURE = """
import json, os, resource, signal, sys
from gradwatch.checkpoint import CheckpointError, read_weights
from gradwatch.inspection import inspect

def size(name):
    with open("/proc/self/status") as status:
        [found] = [l.split()[1] for l in status if l.startswith(name + ":")]
    return int(found) * 1024

def read(path):
    before = size("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + 6 * 2**30,) * 2)
    signal.alarm(20)
    try:
        said = f"{len(inspect(path).streams)} streams"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "grown": size("VmPeak") - before}

for path in sys.stdin.read().split("\\n"):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(read(path)), flush=True)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps({"said": f"died of signal {status}", "grown": -1}))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What reading each file said, and by how many bytes the process grew meanwhile."""
    folder = tmp_path_factory.mktemp("hungry")
    write = dict(OTHERS)
    for name, value in PICKLES.items():
        data = under(value)
        write[name] = lambda path, data=data: archive(path, data)
        write[f"{name}, old format"] = lambda path, data=data: old_format(path, data)
    for name, data in WHOLE.items():
        write[name] = lambda path, data=data: archive(path, data)
    paths = {name: folder / f"{number}.pt" for number, name in enumerate(write)}
    for name, path in paths.items():
        write[name](path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input="\n".join(str(path) for path in paths.values()),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(paths), done.stderr
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return {
        name: (found["said"], found["grown"], sizes[name])
        for name, found in zip(paths, told, strict=True)
    }


HUNGRY = [*OTHERS, *PICKLES, *(f"{name}, old format" for name in PICKLES), *WHOLE]


@pytest.mark.parametrize("name", HUNGRY)
def test_a_file_gets_no_memory_that_it_asks_for(name, measured):
    said, grown, size = measured[name]
    assert said.startswith(("CheckpointError", "ValueError: no recurrent", "0 streams"))
    ours = said.replace("would allocate far more memory than weights need", "")
    assert not re.search("alloc|memory", ours, re.IGNORECASE), said
    # Twice the file, where it is read and mapped, and what its pickle is granted.
    assert grown < min(4 * 2**20 + 28 * size, 300 * 2**20), f"{grown / 2**20:.0f} MB"


# ---- the command


def run(*arguments, out=subprocess.PIPE, **more):
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "gradwatch", *arguments],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root, **more},
    )


def test_the_command_in_a_process_of_its_own(tmp_path):
    path = saved(tmp_path / "model.pt", state())
    done = run("inspect", str(path), "--steps", "50", "--json")
    assert done.returncode == 0 and not done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 50 and len(told["streams"]) == 2
    assert told["streams"][0]["gates"][1]["gate"] == "f"
    done = run("inspect", str(path), "--steps", "0")
    assert done.returncode == 2 and done.stderr.startswith("gradwatch: steps is 0")


@pytest.mark.slow
def test_the_command_where_it_cannot_write(tmp_path):
    path = saved(tmp_path / "model.pt", state())
    with open("/dev/full", "w") as full:
        done = run("inspect", str(path), out=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    odd = saved(tmp_path / "odd.pt", {"模型.weight_hh_l0": torch.eye(3)})
    done = run("inspect", str(odd), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u6a21\\u578b.l0" in done.stdout
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = run("inspect", str(path), out=closed)
    assert not done.stderr


def test_no_verb_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "VERB" in capsys.readouterr().err


def test_nan_in_json(tmp_path, capsys):
    path = saved(tmp_path / "a.pt", broken_values())
    assert cli.main(["inspect", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["streams"][1]["verdict"] == "broken"
    assert told["streams"][1]["gain"] == "nan"
