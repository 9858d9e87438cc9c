import { evalSchema, parseOptions } from '../config';
import type { CommandContext } from './context';
import { flagOf } from './flags';
import { loadData, withModel } from './load';

/** `lora-da eval` */
export async function evaluate(given: Record<string, unknown>, context: CommandContext): Promise<object> {
  const config = parseOptions(evalSchema, given, { nameOf: flagOf });
  const { signal, progress, print } = context;
  return withModel(config, context, async (model) => {
    if (config.adapter !== undefined) await model.loadAdapter(config.adapter);
    const data = await loadData(config.data, config, model, context);
    progress.begin('evaluating', data.length);
    const found = await model.evaluate(data, { perExample: true, signal, onProgress: (done) => progress.update(done) });
    progress.end();
    await data.dispose();
    const { loss, perplexity, labelTokens, perExample = [] } = found;
    if (config.perExample) {
      perExample.forEach((row, i) => {
        print(`row ${i + 1}: loss ${row.loss.toFixed(6)}, ${row.labelTokens} label tokens`);
      });
    }
    print(
      `loss ${loss.toFixed(6)}, perplexity ${perplexity.toFixed(4)}, ${labelTokens} label tokens in ${data.length} rows`,
    );
    return { loss, perplexity, labelTokens, perExample };
  });
}
