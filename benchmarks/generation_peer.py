"""Greedy generation with transformers on a model folder: the peer that `model.generate` is compared with.

Continues one prompt with the key/value cache, never stopping early, and prints one JSON line:
  firstSeconds  of each call that makes one token: the pass over the prompt
  seconds       of each call that makes all of them
  tokens        new ids of a call
  peakBytes     largest resident set of the process (ru_maxrss)

    pip install -r requirements.txt
    python generation_peer.py --model DIR --prompt 1,2,3 --dtype bfloat16
"""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

from peft_train import peak_bytes


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, help='Hugging Face checkpoint folder')
    parser.add_argument('--prompt', required=True, help='token ids, comma-separated')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='bfloat16', help='of the weights and activations')
    parser.add_argument('--new-tokens', type=int, default=128)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=0, help='0: what PyTorch chooses')
    return parser.parse_args()


@torch.inference_mode()
def generate(model, prompt, count):
    start = time.perf_counter()
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=count, max_new_tokens=count, do_sample=False,
        use_cache=True, pad_token_id=0)
    return ids[0, prompt.shape[1]:].tolist(), time.perf_counter() - start


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation='sdpa').eval()
    model.generation_config.eos_token_id = None  # a call makes exactly as many tokens as it is told
    prompt = torch.tensor([[int(token) for token in options.prompt.split(',')]])
    generate(model, prompt, 8)
    first_seconds, seconds, tokens = [], [], []
    for _ in range(options.repeats):
        first_seconds.append(generate(model, prompt, 1)[1])
        tokens, elapsed = generate(model, prompt, options.new_tokens)
        seconds.append(elapsed)
    print(json.dumps(dict(firstSeconds=first_seconds, seconds=seconds, tokens=tokens, peakBytes=peak_bytes())))


if __name__ == '__main__':
    main()
