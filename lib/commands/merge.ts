import { mergeSchema, parseOptions } from '../config';
import type { CommandContext } from './context';
import { flagOf } from './flags';
import { withModel } from './load';

/** `lora-da merge` */
export async function merge(given: Record<string, unknown>, context: CommandContext): Promise<object> {
  const config = parseOptions(mergeSchema, given, { nameOf: flagOf });
  const { signal, progress, print } = context;
  // Weights of every file type are exact in float32; a sum in bfloat16 would not be.
  return withModel({ ...config, dtype: 'float32' }, context, async (model) => {
    const adapter = await model.loadAdapter(config.adapter);
    let started = false;
    const onProgress = (done: number, total: number) => {
      if (!started) progress.begin('merging', total);
      started = true;
      progress.update(done);
    };
    await adapter.merge(config.out, { signal, onProgress });
    progress.end();
    print(`Merged model: ${config.out}`);
    return { out: config.out };
  });
}
