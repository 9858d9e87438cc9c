import type { ChatMessage } from './chat_template';
import { type ErrorCode, LoraDaError } from './errors';
import type { TextCodec } from './text_codec';

/** -100: not a label. */
export const ignoredLabel = -100;

/** What an error shows of a row: its field names, never its content. */
type Row = Record<string, unknown>;

/** Which tokens of a row are labels. */
export type TrainOn = 'completion' | 'assistant' | 'all';

/** How rows become tokens. The rules are written down in docs/data.md. */
export interface RowOptions {
  maxLength: number;
  overlong: 'truncate' | 'drop' | 'error';
  trainOn: TrainOn;
  /** Ids from here on are errors; undefined: the tokenizer's own size, if there is one. */
  vocabSize: number | undefined;
}

/** One row as tokens, of equal length. Position t predicts labels[t + 1]. */
export interface EncodedRow {
  ids: ArrayLike<number>;
  labels: ArrayLike<number>;
}

interface RowKind {
  fields: readonly string[];
  encode(row: Row, options: RowOptions, codec: TextCodec | undefined): EncodedRow;
}

/** In the order in which a row is tried; its first kind counts. */
const kinds: RowKind[] = [
  { fields: ['input_ids'], encode: encodeIds },
  { fields: ['messages'], encode: (row, options, codec) => encodeMessages(row, options, needCodec(codec)) },
  {
    fields: ['prompt', 'completion'],
    encode: (row, options, codec) =>
      encodePair(text(row, 'prompt'), text(row, 'completion'), options, needCodec(codec)),
  },
  {
    fields: ['instruction', 'output'],
    encode: (row, options, codec) => encodePair(instructionPrompt(row), text(row, 'output'), options, needCodec(codec)),
  },
  {
    fields: ['question', 'answer'],
    encode: (row, options, codec) =>
      encodePair(questionPrompt(text(row, 'question')), text(row, 'answer'), options, needCodec(codec)),
  },
  {
    fields: ['text'],
    encode: (row, options, codec) => encodePair('', text(row, 'text'), options, needCodec(codec), true),
  },
];

/** The prompt of a `question` + `answer` row; the answer follows it. */
export function questionPrompt(question: string): string {
  return `Q: ${question}\nA: `;
}

/** The prompt of an `instruction` + `input` + `output` row, as Stanford Alpaca has it; the output follows it. */
export function instructionPrompt(row: Row): string {
  const instruction = text(row, 'instruction');
  const input = row.input === undefined || row.input === null ? '' : text(row, 'input');
  return input === ''
    ? 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' +
        `### Instruction:\n${instruction}\n\n### Response:\n`
    : 'Below is an instruction that describes a task, paired with an input that provides further context. ' +
        'Write a response that appropriately completes the request.\n\n' +
        `### Instruction:\n${instruction}\n\n### Input:\n${input}\n\n### Response:\n`;
}

/**
 * Turns one row into tokens and labels.
 *
 * @throws {LoraDaError} `INVALID_DATA` naming the field and what was expected, without file and row
 */
export function encodeRow(value: unknown, options: RowOptions, codec: TextCodec | undefined): EncodedRow {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw bad('expected a JSON object');
  const row = value as Row;
  for (const kind of kinds) {
    if (!kind.fields.some((field) => row[field] !== undefined)) continue;
    const encoded = kind.encode(row, options, codec);
    checkIds(encoded, options.vocabSize ?? codec?.info.vocabSize, kind.fields[0] === 'input_ids');
    return encoded;
  }
  throw bad(
    'expected input_ids and labels, messages, prompt and completion, instruction and output, question and answer, or text',
  );
}

/** Tokens of the row that a loss is computed for: labels from the second position on. */
export function countLabels(labels: ArrayLike<number>, length: number): number {
  let count = 0;
  for (let i = 1; i < length; i++) if (labels[i] !== ignoredLabel) count++;
  return count;
}

function encodeIds(row: Row): EncodedRow {
  const ids = integers(row, 'input_ids');
  const labels = integers(row, 'labels');
  if (ids.length === 0) throw bad('expected at least one token for input_ids');
  if (labels.length !== ids.length) {
    throw bad(`expected ${ids.length} entries for labels, as many as input_ids has, found ${labels.length}`);
  }
  return { ids, labels };
}

/**
 * Prompt and completion, special tokens as the tokenizer's configuration says, and the end-of-sequence token. The border is
 * the longest common token prefix of the prompt alone and of both together.
 */
function encodePair(
  prompt: string,
  completion: string,
  options: RowOptions,
  codec: TextCodec,
  whole = false,
): EncodedRow {
  const { eosId } = codec.info;
  if (eosId === undefined) {
    throw new LoraDaError(
      'INVALID_CONFIG',
      `${codec.directory}/tokenizer_config.json: expected an eos_token, it is missing`,
    );
  }
  const ids = codec.encode(prompt + completion, true);
  if (ids.at(-1) !== eosId) ids.push(eosId);
  const labels = ids.slice();
  if (!whole && options.trainOn !== 'all') {
    const border = Math.min(commonPrefix(codec.encode(prompt, true), ids), ids.length - 1);
    labels.fill(ignoredLabel, 0, border);
  }
  return { ids, labels };
}

/** The rendered template, encoded without adding special tokens; labels are the assistant turns. */
function encodeMessages(row: Row, options: RowOptions, codec: TextCodec): EncodedRow {
  const messages = checkMessages(row.messages);
  if (!codec.template) {
    throw bad(`expected a model with a chat template for messages, ${codec.directory} has none`);
  }
  const template = codec.template;
  const render = (count: number, prompt: boolean) =>
    template.render(messages.slice(0, count), prompt, row.tools ?? null);
  const full = render(messages.length, false);
  const ids = codec.encode(full, false);
  if (ids.length === 0) throw bad('expected messages that the chat template renders to some text');
  if (options.trainOn === 'all') return { ids, labels: ids };
  const labels = new Int32Array(ids.length).fill(ignoredLabel);
  messages.forEach(({ role }, i) => {
    if (role !== 'assistant') return;
    const before = findPrefix(render, i, i === messages.length - 1 ? full : render(i + 1, false), full, template.file);
    const begin = commonPrefix(codec.encode(before.without, false), ids);
    const end = before.with === full ? ids.length : commonPrefix(codec.encode(before.with, false), ids);
    for (let t = begin; t < end; t++) labels[t] = ids[t]!;
  });
  return { ids, labels };
}

/**
 * The texts without and with turn i. Where the template opens the assistant's turn in its generation prompt, that opening
 * belongs to what comes before.
 */
function findPrefix(
  render: (count: number, prompt: boolean) => string,
  i: number,
  withTurn: string,
  full: string,
  file: string,
): { without: string; with: string } {
  if (full.startsWith(withTurn)) {
    for (const prompt of [true, false]) {
      const without = render(i, prompt);
      if (withTurn.startsWith(without)) return { without, with: withTurn };
    }
  }
  throw bad(
    `the chat template of ${file} does not render messages[${i}] after the same text as the messages before it, ` +
      'so its tokens cannot be told apart; use input_ids and labels, or train on all',
  );
}

function checkMessages(value: unknown): ChatMessage[] {
  if (!Array.isArray(value) || value.length === 0) throw bad('expected a list of at least one message for messages');
  value.forEach((message, i) => {
    if (typeof message !== 'object' || message === null) throw bad(`expected an object for messages[${i}]`);
    if (typeof message.role !== 'string') throw bad(`expected a string for messages[${i}].role`);
    const { content } = message;
    if (typeof content !== 'string' && !Array.isArray(content) && content !== null && content !== undefined) {
      throw bad(`expected a string for messages[${i}].content`);
    }
  });
  return value;
}

function checkIds({ ids, labels }: EncodedRow, vocabSize: number | undefined, given: boolean): void {
  const limit = vocabSize ?? 2 ** 31;
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (!(id >= 0 && id < limit)) {
      throw bad(
        `expected ids from 0 to ${limit - 1} for ${given ? 'input_ids' : 'the tokens of the text'}, found ${id} at ${i}`,
      );
    }
    const label = labels[i]!;
    if (label !== ignoredLabel && !(label >= 0 && label < limit)) {
      throw bad(`expected ${ignoredLabel} or ids from 0 to ${limit - 1} for labels, found ${label} at ${i}`);
    }
  }
}

function integers(row: Row, field: string): ArrayLike<number> {
  const value = row[field];
  const isList = Array.isArray(value) || (ArrayBuffer.isView(value) && !(value instanceof DataView));
  if (!isList) throw bad(`expected a list of integers for ${field}${value === undefined ? ', it is missing' : ''}`);
  const list = value as ArrayLike<unknown>;
  for (let i = 0; i < list.length; i++) {
    if (typeof list[i] === 'bigint') return Array.from(list as ArrayLike<bigint>, Number);
    if (!Number.isInteger(list[i])) throw bad(`expected a list of integers for ${field}, found another value at ${i}`);
  }
  return list as ArrayLike<number>;
}

function text(row: Row, field: string): string {
  const value = row[field];
  if (typeof value === 'string') return value;
  throw bad(`expected a string for ${field}, ${value === undefined ? 'it is missing' : `found ${typeName(value)}`}`);
}

function typeName(value: unknown): string {
  if (value === null) return 'null';
  if (Array.isArray(value)) return 'a list';
  return typeof value === 'object' ? 'an object' : `a ${typeof value}`;
}

function needCodec(codec: TextCodec | undefined): TextCodec {
  if (codec) return codec;
  throw bad('expected input_ids and labels, because the model has no tokenizer (tokenizer.json)');
}

function commonPrefix(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const length = Math.min(a.length, b.length);
  let i = 0;
  while (i < length && a[i] === b[i]) i++;
  return i;
}

function bad(message: string, code: ErrorCode = 'INVALID_DATA'): LoraDaError {
  return new LoraDaError(code, message);
}
