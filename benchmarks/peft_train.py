"""LoRA training with PyTorch and PEFT on a model folder: the peer that `lora-da train` is compared with.

Reads rows of `input_ids` + `labels`, takes them in file order (wrapping around), and prints one JSON line:
  tokensPerSecond  median over the measured steps; padding is not counted as tokens
  stepSeconds      of the measured steps, those after the warm-up
  peakBytes        largest resident set of the process (ru_maxrss)
  losses           of every step, the warm-up included
One step is a forward and backward pass, gradient clipping at 1, and AdamW at a constant rate of 2e-4.

    pip install -r requirements.txt
    python peft_train.py --model DIR --rows rows.jsonl --dtype bfloat16
"""
import argparse
import json
import resource
import statistics
import sys
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='Hugging Face checkpoint folder')
    parser.add_argument('--rows', required=True, help='JSONL file of input_ids and labels (-100 is not a label)')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32', help='of the frozen weights and activations')
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--steps', type=int, default=5, help='measured steps')
    parser.add_argument('--warmup', type=int, default=1, help='steps before the measured ones')
    parser.add_argument('--threads', type=int, default=0, help='0: what PyTorch chooses')
    parser.add_argument('--adapter', help='PEFT folder to start from; without it rank 8, alpha 16, rank-stabilised, all linear modules')
    return parser.parse_args()


def load_model(options):
    base = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation='sdpa')
    base.config.use_cache = False
    if options.adapter:
        return PeftModel.from_pretrained(base, options.adapter, is_trainable=True)
    torch.manual_seed(42)
    return get_peft_model(base, LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=True, target_modules='all-linear', task_type='CAUSAL_LM'))


def make_batch(rows):
    """Rows padded on the right to the longest; the padding is masked and has no label."""
    width = max(len(row['input_ids']) for row in rows)

    def padded(values, fill):
        return values + [fill] * (width - len(values))

    return dict(
        input_ids=torch.tensor([padded(row['input_ids'], 0) for row in rows]),
        labels=torch.tensor([padded(row['labels'], -100) for row in rows]),
        attention_mask=torch.tensor([padded([1] * len(row['input_ids']), 0) for row in rows]))


def train_step(model, optimizer, factors, batch):
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def peak_bytes():
    unit = 1 if sys.platform == 'darwin' else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    with open(options.rows) as file:
        rows = [json.loads(line) for line in file]
    model = load_model(options).train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=2e-4, weight_decay=0.0)
    losses, seconds, rates = [], [], []
    for step in range(options.warmup + options.steps):
        first = step * options.batch_size
        chosen = [rows[(first + i) % len(rows)] for i in range(options.batch_size)]
        start = time.perf_counter()
        losses.append(train_step(model, optimizer, factors, make_batch(chosen)))
        elapsed = time.perf_counter() - start
        if step >= options.warmup:
            seconds.append(elapsed)
            rates.append(sum(len(row['input_ids']) for row in chosen) / elapsed)
    print(json.dumps(dict(
        tokensPerSecond=statistics.median(rates), stepSeconds=seconds, peakBytes=peak_bytes(), losses=losses)))


if __name__ == '__main__':
    main()
