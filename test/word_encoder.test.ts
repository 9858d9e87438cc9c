import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { type LibraryTokenizer, WordEncoder } from '../lib/word_encoder';

const fixtures = join(__dirname, 'fixtures', 'tokenizer');
const cutters = {
  'gpt2-like': 'spaces',
  'qwen-like': 'spaces',
  'llama2-like': 'metaspaces',
  'mistral-like': 'metaspaces',
};

/** Pieces whose borders are delicate. */
const alphabet = [
  ...'abzAZ019 éß東я',
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
  '.',
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
  for (const [kind, cutter] of Object.entries(cutters)) {
    test(kind, async () => {
      const { Tokenizer } = await import('@huggingface/tokenizers');
      const json = JSON.parse(readFileSync(join(fixtures, kind, 'tokenizer.json'), 'utf8'));
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
