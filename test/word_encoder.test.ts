import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { type LibraryTokenizer, WordEncoder } from '../lib/word_encoder';

const fixtures = join(__dirname, 'fixtures', 'tokenizer');
const llama3Pattern =
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };

/** Fixtures, some with another pre-tokenizer, and where their text is cut. */
const tokenizers = [
  { fixture: 'gpt2-like', cutter: 'spaces' },
  { fixture: 'qwen-like', cutter: 'spaces' },
  { fixture: 'llama2-like', cutter: 'metaspaces' },
  { fixture: 'mistral-like', cutter: 'metaspaces' },
  { fixture: 'gpt2-like', cutter: 'spaces', preTokenizers: [{ type: 'Digits', individual_digits: true }, byteLevel] },
  { fixture: 'gpt2-like', cutter: 'spaces', preTokenizers: [{ type: 'Digits', individual_digits: false }, byteLevel] },
  {
    fixture: 'gpt2-like',
    cutter: 'spaces',
    preTokenizers: [
      { type: 'Split', pattern: { Regex: llama3Pattern }, behavior: 'Isolated', invert: false },
      { ...byteLevel, use_regex: false },
    ],
  },
];

/** Pieces whose borders are delicate. */
const alphabet = [
  ...'abzAZ019 éß東я²٣½',
  '1234',
  '(3*12)=36',
  '3.50',
  '  ',
  '\n',
  '\r\n',
  '\t',
  '\u00a0',
  '\u0085',
  '\u3000',
  '\ufeff',
  '▁',
  '🎉',
  '\ud83c',
  "'s",
  "'",
  "'S",
  '.',
  ',',
  '!?',
  'e\u0301',
  'The fox',
  ' counts ',
  '<mask>',
  '</s>',
  '<|im_end|>',
  '<',
];

/** mulberry32 */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

describe('text cut into pieces gives the ids of the text as a whole', () => {
  for (const { fixture, cutter, preTokenizers } of tokenizers) {
    const name = preTokenizers ? `${fixture}, ${JSON.stringify(preTokenizers[0])}` : fixture;
    test(name, async () => {
      const { Tokenizer } = await import('@huggingface/tokenizers');
      const json = JSON.parse(readFileSync(join(fixtures, fixture, 'tokenizer.json'), 'utf8'));
      if (preTokenizers) json.pre_tokenizer = { type: 'Sequence', pretokenizers: preTokenizers };
      const library = new Tokenizer(json, {}) as unknown as LibraryTokenizer;
      const encoder = new WordEncoder(library, json);
      assert.equal(encoder.cutter, cutter);
      const next = random(11);
      for (let i = 0; i < 3000; i++) {
        const length = 1 + Math.floor(next() * 12);
        const text = Array.from({ length }, () => alphabet[Math.floor(next() * alphabet.length)]).join('');
        const whole = library.encode(text, { add_special_tokens: false }).ids;
        assert.deepEqual(encoder.encode(text), whole, JSON.stringify(text));
      }
    });
  }
});

test('a tokenizer whose tokens cross spaces is not cut', async () => {
  const { Tokenizer } = await import('@huggingface/tokenizers');
  const json = JSON.parse(readFileSync(join(fixtures, 'llama2-like', 'tokenizer.json'), 'utf8'));
  json.model.vocab['a▁b'] = 1000;
  const library = new Tokenizer(json, {}) as unknown as LibraryTokenizer;
  assert.equal(new WordEncoder(library, json).cutter, 'none');
});
