import type { GenerateOptions } from '../causal_lm';
import { generateSchema, parseOptions } from '../config';
import { LoraDaError } from '../errors';
import { jsonReason, readText } from '../files';
import type { CommandContext } from './context';
import { flagOf } from './flags';
import { withModel } from './load';

/** `lora-da generate` */
export async function generate(given: Record<string, unknown>, context: CommandContext): Promise<object> {
  const config = parseOptions(generateSchema, given, { nameOf: flagOf });
  const { prompt, raw, inputIds, maxNewTokens, temperature, topP, seed } = config;
  const sources = ['prompt', 'messages', 'raw', 'inputIds'].filter((key) => key in given);
  if (sources.length !== 1) {
    const received = sources.length === 0 ? 'none' : sources.map(flagOf).join(' and ');
    throw new LoraDaError(
      'INVALID_ARGUMENT',
      `Expected one of --prompt, --messages, --raw and --input-ids but received ${received}`,
    );
  }
  const messages = config.messages === undefined ? undefined : await readMessages(config.messages);
  return withModel(config, context, async (model) => {
    if (config.adapter !== undefined) await model.loadAdapter(config.adapter);
    const { signal } = context;
    const input = { prompt, raw, messages, inputIds };
    const { text, tokenIds } = await model.generate({ ...input, maxNewTokens, temperature, topP, seed, signal });
    context.print(text ?? tokenIds.join(','));
    return { text, tokenIds };
  });
}

/** @throws {LoraDaError} `INVALID_FILE` unless the file holds a list of {role, content} */
async function readMessages(file: string): Promise<GenerateOptions['messages']> {
  let value: unknown;
  try {
    value = JSON.parse(await readText(file));
  } catch (error) {
    if (error instanceof LoraDaError) throw error;
    throw new LoraDaError('INVALID_FILE', `${file}: expected JSON: ${jsonReason(error)}`, { cause: error });
  }
  const list = Array.isArray(value) ? value : (value as { messages?: unknown } | null)?.messages;
  if (!Array.isArray(list) || list.length === 0) {
    throw new LoraDaError('INVALID_FILE', `${file}: expected a list of messages, each with role and content`);
  }
  list.forEach((message, i) => {
    for (const field of ['role', 'content']) {
      if (typeof message?.[field] === 'string') continue;
      throw new LoraDaError('INVALID_FILE', `${file}: expected a string for ${field} of message ${i + 1}`);
    }
  });
  return list;
}
