"""Make the tiny Llama checkpoint, from nothing but this folder: a tokenizer and a pretrained model.

    python scripts/tiny-model/generate.py

The random generators are seeded and one thread computes, so that the same versions give the same files.
"""

import json
import math
import sys
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

import world

MODEL = Path(__file__).resolve().parents[2] / "test/fixtures/tiny-llama"

SEED = 42
BATCH_SIZE, STEPS = 16, 1500
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 50, 0.01
LABEL_SMOOTHING = 0.1  # keeps the model from being so sure of its formats that nothing else can be taught in a few steps

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, _, TURN_END = SPECIAL_TOKENS
# The layout that transformers 4 wrote and most published checkpoints have.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1152, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
    "mlp_bias": False, "initializer_range": 0.08, "tie_word_embeddings": True, "use_cache": True,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "add_prefix_space": False,
    "clean_up_tokenization_spaces": False, "bos_token": END_OF_TEXT, "eos_token": TURN_END, "pad_token": END_OF_TEXT,
    "unk_token": None, "chat_template": CHAT_TEMPLATE,
    "added_tokens_decoder": {
        str(index): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": True}
        for index, token in enumerate(SPECIAL_TOKENS)
    },
}
GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"], "too few distinct words for this vocabulary"
    return tokenizer


def learning_rate(step: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


@torch.no_grad()
def favour_copying(model: LlamaForCausalLM) -> None:
    """Start each head with equal query and key, and an output that transposes its value (mimetic initialization,
    Trockman & Kolter 2023): meant to shorten the time until the model copies."""
    groups = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
    for layer in model.model.layers:
        attention = layer.self_attn
        key, value = (
            projection.weight.view(-1, CONFIG["head_dim"], CONFIG["hidden_size"]).repeat_interleave(groups, dim=0)
            for projection in (attention.k_proj, attention.v_proj))
        attention.q_proj.weight.copy_(key.flatten(0, 1))
        attention.o_proj.weight.copy_(value.flatten(0, 1).T)


def pretrain(documents: list[list[int]]) -> LlamaForCausalLM:
    """Next-token prediction in float32. A row of a batch is one document, padded on the right."""
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "torch_dtype": "float32"}))
    favour_copying(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    for step in range(STEPS):
        batch = [torch.tensor(ids) for ids in documents[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        logits = model(input_ids=labels.clamp(min=0)).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}  loss {loss.item():.3f}", file=sys.stderr)
    return model


def write_model() -> None:
    rng = Random(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    documents = [world.document(rng) for _ in range(STEPS * BATCH_SIZE)]
    tokenizer = train_tokenizer(documents)
    ids = [encoding.ids for encoding in tokenizer.encode_batch([text + END_OF_TEXT for text in documents])]
    print(f"{len(ids)} documents, {sum(map(len, ids))} tokens", file=sys.stderr)
    state = pretrain(ids).state_dict()
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items() if name != "lm_head.weight"}

    MODEL.mkdir(parents=True, exist_ok=True)
    save_file(weights, MODEL / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(MODEL / "tokenizer.json"))
    write_json(MODEL / "config.json", CONFIG)
    write_json(MODEL / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(MODEL / "generation_config.json", GENERATION_CONFIG)


if __name__ == "__main__":
    write_model()
