"""Training steps of PyTorch and PEFT on a GPU, for the shapes of bench_gpu_throughput (models.cpp) with random weights.

Appends a line per shape to the file of results, as measure.h lays it out: "MODEL, step of SHAPE with PEFT", tokens/s. Exits with 77 where
PyTorch, transformers, PEFT or a GPU for them is missing. A step is a forward and backward pass, clipping at 1 and fused AdamW on factors
in float32; attention is PyTorch's scaled dot product; the loss is read on the host, as ours is.

    python peft_step.py --models smollm2-135m,llama-3.2-1b --shapes 4x256,8x512 --results results.tsv
"""
import argparse
import statistics
import sys
import time

try:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig
except ImportError as error:
    print(f'skipped: {error}')
    sys.exit(77)

SHAPES = {
    #                vocabulary, hidden, intermediate, layers, heads, key heads, head size, theta, tied head
    'smollm2-135m': (49152, 576, 1536, 30, 9, 3, 64, 1e5, True),
    'llama-3.2-1b': (128256, 2048, 8192, 16, 32, 8, 64, 5e5, True),
    'llama-2-7b': (32000, 4096, 11008, 32, 32, 32, 128, 1e4, False),
    'tiny': (256, 64, 96, 2, 4, 2, 16, 1e4, False),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default='smollm2-135m,llama-3.2-1b,llama-2-7b')
    parser.add_argument('--shapes', default='4x256,8x512')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--steps', type=int, default=10, help='measured steps')
    parser.add_argument('--warmup', type=int, default=3, help='steps before the measured ones')
    parser.add_argument('--results', required=True)
    return parser.parse_args()


def load_model(name, device):
    vocabulary, hidden, intermediate, layers, heads, key_heads, head_size, theta, tied = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_size, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type='default', rope_theta=theta), rope_theta=theta, tie_word_embeddings=tied,
        max_position_embeddings=4096, use_cache=False, attn_implementation='sdpa')
    torch.manual_seed(1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(default)
    return get_peft_model(base, LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, use_rslora=True, target_modules='all-linear', task_type='CAUSAL_LM'))


def step(model, optimizer, factors, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def measure(model, shape, options):
    sequences, length = (int(part) for part in shape.split('x'))
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), device=options.device)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, weight_decay=0.0, fused=options.device.startswith('cuda'))
    seconds = []
    for index in range(options.warmup + options.steps):
        start = time.perf_counter()
        step(model, optimizer, factors, ids)
        if index >= options.warmup:
            seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds)
    detail = f'{typical * 1e3:.2f} ms, fastest {min(seconds) * 1e3:.2f}, slowest {max(seconds) * 1e3:.2f}'
    return sequences * length / typical, f'{detail}; torch {torch.__version__}'


def main():
    options = arguments()
    on_gpu = options.device.startswith('cuda')
    if on_gpu and not torch.cuda.is_available():
        print('skipped: PyTorch sees no GPU')
        sys.exit(77)
    with open(options.results, 'a') as results:
        def line(*columns):
            print(*columns)
            results.write('\t'.join(columns) + '\n')
            results.flush()

        for name in options.models.split(','):
            model = None
            for shape in options.shapes.split(','):
                what = f'{name}, step of {shape} with PEFT'
                try:
                    model = model or load_model(name, options.device).train()
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats()
                    rate, detail = measure(model, shape, options)
                    line(what, f'{rate:.0f}', 'tokens/s', '', 'ok', detail)
                    if on_gpu:
                        most = torch.cuda.max_memory_allocated() / 1e9
                        line(f'{what}: most memory', f'{most:.4g}', 'GB', '', 'ok', "PyTorch's allocations")
                except torch.cuda.OutOfMemoryError:
                    line(what, '', '', '', 'skipped', 'out of memory')
            del model
            if on_gpu:
                torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
