/**
 * Greedy generation with lora-da: our side of generation.ts. Takes the same prompt and times the same calls as
 * generation_peer.py, and prints one JSON line of the same form.
 */
import { parseArgs } from 'node:util';
import { CausalLM, type Dtype } from '../lib/index';
import { runMain } from './harness';
import { peakBytes } from './train_ours';

/** What either side prints. */
export interface GenerationFigures {
  /** Of each call that makes one token: the pass over the prompt. */
  firstSeconds: number[];
  /** Of each call that makes all of them. */
  seconds: number[];
  /** New ids of a call. */
  tokens: number[];
  /** Largest resident set of the process. */
  peakBytes: number;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      prompt: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16' },
      'new-tokens': { type: 'string', default: '128' },
      repeats: { type: 'string', default: '3' },
      threads: { type: 'string', default: '0' },
    },
  });
  const model = await CausalLM.load(values.model!, {
    device: 'cpu',
    dtype: values.dtype as Dtype,
    threads: Number(values.threads),
  });
  const inputIds = values.prompt!.split(',').map(Number);
  const generate = async (maxNewTokens: number) => {
    const began = performance.now();
    const { tokenIds } = await model.generate({ inputIds, maxNewTokens, stopIds: [] });
    return { tokenIds, seconds: (performance.now() - began) / 1000 };
  };
  await generate(8);
  const firstSeconds: number[] = [];
  const seconds: number[] = [];
  let tokens: number[] = [];
  for (let i = 0; i < Number(values.repeats); i++) {
    firstSeconds.push((await generate(1)).seconds);
    const whole = await generate(Number(values['new-tokens']));
    seconds.push(whole.seconds);
    tokens = whole.tokenIds;
  }
  console.log(JSON.stringify({ firstSeconds, seconds, tokens, peakBytes: peakBytes() } satisfies GenerationFigures));
  await model.dispose();
}

runMain(main);
