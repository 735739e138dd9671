"""User errors end in one line on stderr and status 2, before any work, and overwrite nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_pretrained, small_model, word_tokenizer

import eval as evaluation
import train_grpo
import train_sft
from lib import plots
from lib.distributed import init_distributed
from lib.flags import parse_flags
from lib.run_dir import save_checkpoint
from paper import bench, forgetting, reproduce

SCRIPTS = {
    "sft": (train_sft, train_sft.SftConfig, None),
    "grpo": (train_grpo, train_grpo.GrpoConfig, None),
    "eval": (evaluation, evaluation.EvalConfig, "checkpoints"),
    "bench": (bench, bench.BenchConfig, None),
    "plot": (plots, plots.PlotConfig, "runs"),
    "reproduce": (reproduce, reproduce.ReproduceConfig, "experiment"),
    "forgetting": (forgetting, forgetting.ForgettingConfig, "runs"),
}
ROOT = Path(train_sft.__file__).parent
COMMANDS = {
    "sft": [str(ROOT / "train_sft.py")],
    "grpo": [str(ROOT / "train_grpo.py")],
    "eval": [str(ROOT / "eval.py")],
    "bench": ["-m", "paper.bench"],
    "plot": ["-m", "lib.plots"],
    "reproduce": ["-m", "paper.reproduce"],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Checkpoints good/step-3 and broken/step-3, a broken log, and a pretrained model."""
    folder = tmp_path_factory.mktemp("original")
    make_pretrained(folder / "pretrained")
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    training = {"stage": "sft", "field": 11, "relabel": "fixed", "total": 3, "lr": 0.003}
    save_checkpoint(folder / "good", 3, model, word_tokenizer(11), optimizer, training).result()
    shutil.copytree(folder / "good", folder / "broken")
    weights = folder / "broken/step-3/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "log").mkdir()
    rows = '{"update": 1}\n{"update": 2\n{"update": 3}\n'
    (folder / "log/metrics.jsonl").write_text(rows)
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A working folder with copies of these."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents() -> dict[Path, bytes]:
    """Return every path under the working folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


def refused(script: str, flags: str, monkeypatch, capsys) -> str:
    """Run a script in this process; return the line with which it refuses its flags."""
    module, config, positional = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        config = parse_flags(config, "", positional)
        if script in ("plot", "reproduce"):
            module.main(config)
        else:
            module.main(config, init_distributed())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert contents() == before, "nothing is created or overwritten"
    return err


INVOCATIONS = [
    ("sft", "--lr -1", "--lr"),
    ("sft", "--lr nan", "--lr"),
    ("sft", "--batch-size 0", "--batch-size"),
    ("sft", "--updates 0", "--updates"),
    ("sft", "--epochs 3", "--examples"),
    ("sft", "--epochs 3 --updates 3 --examples 9", "not both"),
    ("sft", "--field 12", "12 is not prime"),
    ("sft", "--steps 5-2", "steps"),
    ("sft", "--steps five", "range"),
    ("sft", "--parts 0", "parts"),
    ("sft", "--steps 30-50", "labels"),
    ("sft", "--strategy sideways", "sideways"),
    ("sft", "--nonsense 1", "--nonsense"),
    ("sft", "--model nowhere", "nowhere"),
    ("sft", "--resume --out nowhere", "nowhere"),
    ("sft", "--out good", "holds a run already"),
    ("sft", "--out good --resume --lr 0.1", "--lr"),
    ("sft", "--precision fp8", "fp8"),
    ("sft", "--lora 4", "--lora needs a trained --model"),
    ("sft", "--model good --lora -1", "--lora"),
    ("sft", "--model good --lora 4 --lora-dropout 1", "--lora-dropout"),
    ("sft", "--model pretrained --position-gap 5", "--position-gap"),
    ("sft", "--model pretrained --lora-alpha 0", "--lora-alpha"),
    ("bench", "--rounds 0", "--rounds"),
    ("bench", "--json nowhere/b.json", "nowhere/b.json"),
    ("grpo", "--micro-batch-tokens -1", "--micro-batch-tokens"),
    ("grpo", "--init good --examples -1", "--examples"),
    ("grpo", "--max-new-tokens 5000", "positions"),
    ("grpo", "--group 1", "--group"),
    ("grpo", "--init good --keep -1", "--keep"),
    ("grpo", "--group x", "--group"),
    ("grpo", "--temperature 0", "--temperature"),
    ("grpo", "--clip-low 1.5", "--clip-low"),
    ("grpo", "--beta -1", "--beta"),
    ("grpo", "--evaluation-share 2", "evaluation share"),
    ("grpo", "--init nowhere", "nowhere"),
    ("grpo", "--init good --field 13", "--field"),
    ("grpo", "--init good --relabel shown", "--relabel"),
    ("grpo", "--init good --out good", "holds a run already"),
    ("grpo", "--init good --max-new-tokens 5000", "positions"),
    ("grpo", "--clip-high 0", "--clip-high"),
    ("grpo", "--field 2 --steps 1 --evaluation-share 1", "no validation problems"),
    ("grpo", "--init good --out good --resume", "no checkpoint of this script"),
    ("eval", "nowhere", "nowhere"),
    ("eval", "log", "no checkpoint"),
    ("eval", "", "name one checkpoint"),
    ("eval", "good good good", "one checkpoint, or two"),
    ("eval", "good --problems 0", "--problems"),
    ("eval", "good --temperature 0", "--greedy"),
    ("eval", "good --json nowhere/a.json", "nowhere"),
    ("eval", "good --json good", "folder"),
    ("eval", "good --plot a.txt", ".png"),
    ("eval", "good good/step-3", "both names"),
    ("eval", "good --difficulty none", "none"),
    ("sft", "--seed 1.5", "--seed"),
    ("sft", f"--out {'long' * 80}", "name too long"),
    ("grpo", f"--init {'long' * 80}", "name too long"),
    ("eval", f"{'long' * 80}", "name too long"),
    ("sft", "--field -7", "prime"),
    ("sft", "--field 1", "prime"),
    ("sft", "--fsdp", "--fsdp"),
    ("sft", "--keep -1", "--keep"),
    ("sft", "--save-every 0", "--save-every"),
    ("sft", "--max-grad-norm 0", "--max-grad-norm"),
    ("sft", "--eval-every 0", "--eval-every"),
    ("sft", "--weight-decay -1", "--weight-decay"),
    ("sft", "--position-gap -1", "--position-gap"),
    ("sft", "--examples 5 --epochs 0", "--epochs"),
    ("sft", "--warmup -1", "--warmup"),
    ("sft", "--out good/step-3/config.json/run", "cannot write"),
    ("sft", "--resume --out broken", "model.safetensors"),
    ("sft", "--model broken", "model.safetensors"),
    ("sft", "--out log --resume", "no checkpoint to resume"),
    ("grpo", "--init broken", "model.safetensors"),
    ("grpo", "--init good --fsdp", "--fsdp"),
    ("grpo", "--init good --updates 0", "--updates"),
    ("grpo", "--init good --prompts 0", "--prompts"),
    ("grpo", "--init good --lr 2", "--lr"),
    ("grpo", "--init good --eval-every -1", "--eval-every"),
    ("grpo", "--init good --keep-responses -1", "--keep-responses"),
    ("grpo", "--init good --eval-problems 0", "--eval-problems"),
    ("grpo", "--init good --difficulty brutal", "brutal"),
    ("grpo", "--init good --out good/step-3/config.json", "cannot write"),
    ("eval", "broken", "model.safetensors"),
    ("eval", "good broken", "model.safetensors"),
    ("eval", "good --samples 0", "--samples"),
    ("eval", "good --seed x", "--seed"),
    ("eval", "good --steps 9-6", "steps"),
    ("eval", "good --parts 5-2", "parts"),
    ("bench", "--only nothing", "nothing"),
    ("plot", "", "run"),
    ("plot", "nowhere", "nowhere"),
    ("plot", "log", "log/metrics.jsonl, line 2"),
    ("plot", "log --out nowhere/a.png", "nowhere"),
    ("reproduce", "", "name an experiment"),
    ("reproduce", "table9", "table9"),
    ("reproduce", "table1 --seeds 0", "--seeds"),
]


@pytest.mark.parametrize("script, flags, says", INVOCATIONS)
def test_flags(script, flags, says, place, monkeypatch, capsys):
    assert says in refused(script, flags, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, says", INVOCATIONS)
def test_real_commands(script, flags, says, place):
    """Run the same commands as a user does; each is refused within five seconds."""
    command = [sys.executable, *COMMANDS[script], *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before, clock = contents(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - clock
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and contents() == before and seconds < 5


def spoil(folder: Path, how: str) -> None:
    (folder / "manifest.json").unlink()  # as in a model from elsewhere; it would show the change
    config = json.loads((folder / "config.json").read_text())
    if how == "architecture":
        config["model_type"] = "gpt2"
    elif how == "shape":
        config["hidden_size"] = 64
    elif how == "scaled rope":
        config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6}
    elif how == "old scaled rope":
        del config["rope_theta"]
        config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    elif how == "activation":
        config["hidden_act"] = "gelu"
    elif how == "fields":
        del config["hidden_size"]
    elif how == "type":
        config["hidden_size"] = "many"
    elif how == "zero":
        config["num_attention_heads"] = 0
    elif how == "list":
        config = []
    (folder / "config.json").write_text("{" if how == "json" else json.dumps(config))
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "missing":
        weights.unlink()
    elif how == "empty tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None"}}')
    elif how == "tokenizer":
        word_tokenizer(2).inner.save_pretrained(folder)


HOW = [
    "architecture",
    "shape",
    "scaled rope",
    "old scaled rope",
    "activation",
    "fields",
    "type",
    "zero",
    "list",
    "json",
]
HOW += ["cut", "missing", "empty tokenizer", "broken tokenizer", "tokenizer"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("script, flag", [("eval", ""), ("grpo", "--init")])
def test_spoiled_checkpoints(how, script, flag, place, monkeypatch, capsys):
    spoil(place / "good" / "step-3", how)
    refused(script, f"{flag} good", monkeypatch, capsys)


def test_a_spoiled_optimizer_is_refused_on_resume(place, monkeypatch, capsys):
    (place / "good" / "step-3" / "manifest.json").unlink()
    (place / "good" / "step-3" / "training_state.pt").write_bytes(b"PK")
    assert "optimizer" in refused("sft", "--resume --out good", monkeypatch, capsys)


def test_a_checkpoint_cannot_run_code(place, monkeypatch, capsys):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trapped",)

    (place / "good" / "step-3" / "manifest.json").unlink()
    torch.save({"state": Trap()}, place / "good" / "step-3" / "training_state.pt")
    refused("sft", "--resume --out good", monkeypatch, capsys)
    assert not Path("trapped").exists()


def test_checkpoints_of_different_fields_are_not_compared(place, monkeypatch, capsys):
    shutil.copytree("good", "other")
    (place / "other" / "step-3" / "manifest.json").unlink()
    (place / "other" / "step-3" / "training.json").write_text('{"field": 13}')
    assert "different fields" in refused("eval", "good other", monkeypatch, capsys)


def test_the_real_command_refuses_too(place):
    script = Path(evaluation.__file__)
    done = subprocess.run([sys.executable, str(script), "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "eval.py: there is no folder nowhere\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_line_of_help(script, monkeypatch, capsys):
    _, config, positional = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stop:
        parse_flags(config, "", positional)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in config.__dataclass_fields__:
        flag = f"--{name.replace('_', '-')}"
        shown = flag if name != positional else name.upper()
        assert re.search(rf"{shown}(?![\w-])", text), flag
