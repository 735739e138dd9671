"""Other people's code on the benchmark's work: the same sizes, and weights where it takes ours.

transformers' `generate`, TRL's GRPOTrainer (pip install trl==1.16.0; adapters also need peft) and
llama.cpp's batched decoding (pip install llama-cpp-python gguf, which compiles it for this CPU).
"""

import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib import checkpoint
from lib.flags import require
from lib.tokenizer import word_tokenizer
from lib.transformer import hf_weights
from rollout import sample_tokens

SPECIAL = word_tokenizer([])  # whose tokens every word-level tokenizer begins with


def transformers_model(ours, eos_token_id: int | None) -> nn.Module:
    """Return transformers' model of the same shape and weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # takes two seconds

    config = checkpoint.hf_config(ours.work.shape, SPECIAL) | {"eos_token_id": eos_token_id}
    with ours.world.device:
        peer = Qwen2ForCausalLM(Qwen2Config(**config))
    peer.load_state_dict(dict(hf_weights(ours.master)), strict=False)  # tied: without the head
    return peer


def generate(ours, dtype: torch.dtype, cache: str) -> Callable[[], object]:
    """Return a call of transformers' generate that does the same work with the same weights."""
    work, device = ours.work, ours.world.device
    peer = transformers_model(ours, None).eval().to(device, dtype)
    prompts = torch.tensor(ours.prompts, device=device).repeat_interleave(work.group, 0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    options |= {"max_new_tokens": work.new_tokens, "min_new_tokens": work.new_tokens}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    return lambda: peer.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def trl_update_seconds(ours, precision: str, rounds: int) -> float:
    """Return the seconds of the fastest update of TRL's GRPOTrainer, without the first."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    work, seconds = ours.work, []
    # The tokenizer adds three special tokens to the words. Rewards are random: a hash's last bit.
    tokenizer = word_tokenizer([f"w{i}" for i in range(work.shape.vocab_size - 3)]).inner
    prompts = [{"prompt": " ".join(["w5"] * work.prompt_len)}] * (work.prompts * (rounds + 2))
    data = {"train_dataset": Dataset.from_list(prompts), "processing_class": tokenizer}
    data |= {"reward_funcs": lambda completions, **_: [float(hash(c) % 2) for c in completions]}
    batch_size, on_gpu = work.prompts * work.group, torch.cuda.is_available()
    micro_batch = min(batch_size, 16 if on_gpu else 64)  # of Qwen's logits a card holds no more
    options = {"use_cpu": not on_gpu, "bf16": precision == "bf16"}
    options |= {"per_device_train_batch_size": micro_batch}
    options |= {"gradient_accumulation_steps": batch_size // micro_batch}
    options |= {"num_generations": work.group, "max_completion_length": work.new_tokens}
    options |= {"generation_kwargs": {"min_new_tokens": work.new_tokens}, "max_steps": 1 + rounds}
    options |= {"learning_rate": 1e-5, "beta": ours.config.beta, "temperature": 1.0, "top_k": 0}
    options |= {"gradient_checkpointing": False, "save_strategy": "no"}
    options |= {"report_to": [], "disable_tqdm": True, "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as folder:  # TRL loads policy and reference from it
        transformers_model(ours, SPECIAL.inner.eos_token_id).save_pretrained(folder)
        if work.lora:
            from peft import LoraConfig

            sizes = {"r": work.lora, "lora_alpha": 2 * work.lora, "lora_dropout": 0.0}
            data["peft_config"] = LoraConfig(**sizes, target_modules="all-linear")
            if precision == "bf16":  # frozen weights, as ours; by default TRL loads them in fp32
                options["model_init_kwargs"] = {"dtype": "bfloat16"}
        GRPOTrainer(folder, args=GRPOConfig(folder, **options), callbacks=[Clock()], **data).train()
    gc.collect()  # the trainer is in cycles, and ours needs its memory
    return min(seconds[1:])


# ------------------------------------------------------------------------------------------------
# llama.cpp


def write_gguf(ours, precision: str, file: Path) -> None:
    """Write the model, without its adapters, as llama.cpp reads it, matrices in `precision`."""
    import gguf

    shape, writer = ours.work.shape, gguf.GGUFWriter(file, "qwen2")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, shape.num_hidden_layers)
    for name, weight in hf_weights(ours.master):
        stem, _, kind = name.rpartition(".")
        array, stored_as = weight.detach().float().numpy(), None
        if weight.ndim == 2 and precision == "bf16":
            stored_as = gguf.GGMLQuantizationType.BF16
            array = gguf.quantize(array, stored_as)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", array, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_rollouts(ours, precision: str) -> Iterator[Callable[[], Tensor]]:
    """Yield calls of llama.cpp's batched decoding that do the same work with the same weights.

    One a setting: attention fused or not, one KV buffer for all sequences or one for each.
    """
    import llama_cpp as llama

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(ours, precision, file)
        options = llama.llama_model_default_params()
        options.use_mmap = False  # the file will be gone
        model = llama.llama_model_load_from_file(str(file).encode(), options)
    for settings in product((0, 1), (False, True)):
        yield llama_cpp_rollout(llama, model, ours, *settings)


def llama_cpp_rollout(llama, model, ours, fused: int, unified: bool) -> Callable[[], Tensor]:
    """Return a call that samples a rollout's tokens (B, T) under these settings.

    As in ours each prompt is computed once for its group; our function samples the tokens.
    """
    work, vocab_size = ours.work, ours.work.shape.vocab_size
    P, G, n, T = work.prompts, work.group, work.prompt_len, work.new_tokens
    B = P * G
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_seq_max, options.n_batch = B * (n + T), B, max(2048, P * n)
    options.flash_attn_type, options.kv_unified = fused, unified
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, options)
    memory, batch = llama.llama_get_memory(context), llama.llama_batch_init(max(B, P * n), 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> Tensor:
        """Decode tokens, with positions and sequences; return the logits that are wanted."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(context, batch)
        require(status == 0, f"llama.cpp cannot decode a batch: status {status}")
        shape = sum(row[-1] for row in rows), vocab_size
        return torch.from_numpy(np.ctypeslib.as_array(llama.llama_get_logits(context), shape))

    def rollout() -> Tensor:
        llama.llama_memory_clear(memory, True)
        prompts = enumerate(ours.prompts)
        rows = [(x, i, p * G, i == n - 1) for p, prompt in prompts for i, x in enumerate(prompt)]
        logits = decode(rows).repeat_interleave(G, 0)  # (B, V)
        for row in range(B):
            if member := row % G:  # of its group
                llama.llama_memory_seq_cp(memory, row - member, row, -1, -1)
        uniforms, tokens = torch.rand(T, B), []
        for t in range(T):
            if t:
                last = enumerate(tokens[-1].tolist())
                logits = decode([(token, n + t - 1, row, True) for row, token in last])
            tokens.append(sample_tokens(logits, uniforms[t], 1.0)[0])
        return torch.stack(tokens, 1)

    return rollout
