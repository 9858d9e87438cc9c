"""LoRA-DA as its authors published it, on a model folder: the peer that `adapter.initialize` is compared with.

Calls `lora_da.py` of a checkout of their repository (https://github.com/zqy0126/LoRA-DA; none of its code is here) with
their settings: one sample at a time, Fisher passes over 8 layers each, 10 iterations of LOBPCG. The mean gradient, which
their run_exp.py takes in one pass before, is taken here in the same way, of the adapted weights alone. Prints one JSON line:
  gradientSeconds  the pass that takes the mean gradient
  fisherSeconds    the passes that take Z and ydiag, with the solves between them
  peakBytes        largest resident set of the process (ru_maxrss)

    pip install -r requirements.txt
    python lora_da_authors.py --peer-path CHECKOUT --model DIR --rows rows.jsonl --dtype bfloat16
"""
import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from peft_train import make_batch, peak_bytes


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--peer-path', required=True, help="checkout of the authors' repository")
    parser.add_argument('--model', required=True, help='Hugging Face checkpoint folder')
    parser.add_argument('--rows', required=True, help='JSONL file of input_ids and labels (-100 is not a label)')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32', help='of the weights and activations')
    parser.add_argument('--threads', type=int, default=0, help='0: what PyTorch chooses')
    return parser.parse_args()


def adapted_weights(model):
    """Weight of every linear module but the head, by name."""
    return {
        name: module.weight for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith('model.layers.')}


def mean_gradient(model, samples):
    weights = adapted_weights(model)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for sample in samples:
        model(**{name: value[None] for name, value in sample.items()}).loss.backward()
    gradients = {f'{name}.weight': weight.grad / len(samples) for name, weight in weights.items()}
    model.zero_grad(set_to_none=True)
    return gradients


def main():
    options = arguments()
    sys.path.append(options.peer_path)
    from lora_da import estimate_lora_da_initializations

    if options.threads:
        torch.set_num_threads(options.threads)
    with open(options.rows) as file:
        rows = [json.loads(line) for line in file]
    samples = [{name: value[0] for name, value in make_batch([row]).items()} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).train()
    model.config.use_cache = False
    start = time.perf_counter()
    gradients = mean_gradient(model, samples)
    between = time.perf_counter()
    estimate_lora_da_initializations(
        model, samples, gradients, target_modules={name.split('.')[-1] for name in adapted_weights(model)}, rank=8,
        population_size=len(samples), batch_size=1, variance_beta=0.03, damping=1e-6, gamma=1024, lobpcg_niter=10,
        fisher_layers_per_pass=8)
    end = time.perf_counter()
    print(json.dumps(dict(gradientSeconds=between - start, fisherSeconds=end - between, peakBytes=peak_bytes())))


if __name__ == '__main__':
    main()
