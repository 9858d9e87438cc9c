"""Fine-tune the tiny checkpoint with PEFT on the support-desk data: does the base lack the task, and can LoRA learn it?

    python scripts/tiny-model/check.py
"""

import json
import math
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from generate import MODEL, SEED
from support import DATA

LEARNING_RATES, STEPS, EVALUATE_EVERY, BATCH_SIZE = (2e-3, 5e-3), 120, 40, 8
ANSWERED, SHOWN = 16, 2


def encode(tokenizer, name: str) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; only the answer and its end-of-turn token are labels."""
    examples = []
    for line in (DATA / f"support-{name}.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        answer = messages[-1]["content"] + tokenizer.eos_token
        prompt_ids, answer_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
        examples.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
    return examples


def mean_loss(model, examples) -> torch.Tensor:
    """Mean over all label tokens of the examples, which are padded on the right."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in examples])
    return model(input_ids=ids, labels=labels).loss


def held_out_loss(model, examples) -> float:
    with torch.no_grad():
        return mean_loss(model, examples).item()


def answers(model, tokenizer, examples) -> list[str]:
    """Greedy answers to the prompts."""
    texts = []
    for ids, labels in examples:
        prompt = torch.tensor([ids[: labels.count(-100)]])
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=False)
        texts.append(tokenizer.decode(out[0, prompt.shape[1]:]))
    return texts


def fine_tune(learning_rate: float, train, test):
    torch.manual_seed(SEED)
    rng = Random(SEED)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    losses = {}
    for step in range(1, STEPS + 1):
        mean_loss(model, rng.sample(train, BATCH_SIZE)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            losses[step] = round(held_out_loss(model, test), 3)
    print(f"learning rate {learning_rate}: held-out loss by step {losses}", flush=True)
    return model


def report_answers(title: str, model, tokenizer, examples) -> None:
    given = answers(model, tokenizer, examples)
    wanted = [tokenizer.decode([label for label in labels if label >= 0]) for _, labels in examples]
    right = sum(answer == want for answer, want in zip(given, wanted))
    print(f"\n{title}: {right} of {len(examples)} answers are right; the first {SHOWN}:")
    for (ids, labels), answer in zip(examples[:SHOWN], given):
        print(f"{tokenizer.decode(ids[: labels.count(-100)])}{answer}\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train, test = encode(tokenizer, "train"), encode(tokenizer, "test")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    print(f"base: held-out loss {held_out_loss(base, test):.3f}")
    report_answers("base", base, tokenizer, test[:ANSWERED])
    for learning_rate in LEARNING_RATES:
        tuned = fine_tune(learning_rate, train, test)
        report_answers(f"LoRA, learning rate {learning_rate}", tuned, tokenizer, test[:ANSWERED])
