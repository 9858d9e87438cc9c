import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { after, before, describe, test } from 'node:test';
import { TextCodec } from '../lib/text_codec';
import { Tokenizer } from '../lib/tokenizer';

const fixtures = join(__dirname, 'fixtures', 'tokenizer');
const smollm = join(__dirname, '..', '..', 'shared', 'models', 'SmolLM2-135M-Instruct');
const folders: Record<string, string> = { smollm2: smollm, 'tiny-llama': join(fixtures, '..', 'tiny-llama') };

interface Expected {
  bosId: number | null;
  eosId: number;
  texts: { text: string; ids: number[]; plain: number[]; decoded: string; decodedWithSpecial: string }[];
  chats: { messages: { role: string; content: string }[]; text?: string; prompt?: string; refused?: string }[];
}

const kinds = ['gpt2-like', 'qwen-like', 'llama2-like', 'mistral-like', 'tiny-llama', 'smollm2'];

for (const kind of kinds) {
  const directory = folders[kind] ?? join(fixtures, kind);
  describe(`the ${kind} tokenizer`, { skip: existsSync(directory) ? false : `no ${directory}` }, () => {
    const expected: Expected = JSON.parse(readFileSync(join(fixtures, `${kind}.json`), 'utf8'));
    let tokenizer: Tokenizer;
    before(async () => {
      tokenizer = await Tokenizer.load(directory);
    });
    after(() => tokenizer.dispose());

    test('gives the ids that transformers gives', async () => {
      for (const { text, ids, plain } of expected.texts) {
        assert.deepEqual(Array.from(await tokenizer.encode(text)), ids, JSON.stringify(text));
        const bare = await tokenizer.encode(text, { addSpecialTokens: false });
        assert.deepEqual(Array.from(bare), plain, JSON.stringify(text));
      }
    });

    test('gives the same ids when it has seen the words before', async () => {
      for (const { text, ids } of expected.texts) {
        assert.deepEqual(Array.from(await tokenizer.encode(text)), ids, JSON.stringify(text));
      }
    });

    test('decodes as transformers does', async () => {
      for (const { text, ids, decoded, decodedWithSpecial } of expected.texts) {
        assert.equal(await tokenizer.decode(ids), decoded, JSON.stringify(text));
        assert.equal(
          await tokenizer.decode(ids, { skipSpecialTokens: false }),
          decodedWithSpecial,
          JSON.stringify(text),
        );
      }
    });

    test('knows its special tokens', () => {
      assert.equal(tokenizer.bosId, expected.bosId ?? undefined);
      assert.equal(tokenizer.eosId, expected.eosId);
      assert.ok(tokenizer.eosIds.includes(expected.eosId));
    });

    test('renders chats as transformers does', async () => {
      assert.equal(tokenizer.hasChatTemplate, expected.chats.length > 0);
      for (const { messages, text, prompt, refused } of expected.chats) {
        if (refused !== undefined) {
          await assert.rejects(tokenizer.applyChatTemplate(messages), {
            code: 'INVALID_DATA',
            message: /refuses the messages/,
          });
          continue;
        }
        assert.equal(await tokenizer.applyChatTemplate(messages), text);
        assert.equal(await tokenizer.applyChatTemplate(messages, { addGenerationPrompt: true }), prompt);
      }
    });
  });
}

describe('a changed tokenizer folder', () => {
  let directory: string;
  before(() => {
    directory = mkdtempSync(join(tmpdir(), 'lora-da-'));
  });
  after(() => rmSync(directory, { recursive: true }));

  /** A copy of a fixture with some fields of tokenizer_config.json changed. */
  function folder(kind: string, change: Record<string, unknown>, files: Record<string, string> = {}): string {
    const copy = mkdtempSync(join(directory, 'folder-'));
    cpSync(join(fixtures, kind), copy, { recursive: true });
    const file = join(copy, 'tokenizer_config.json');
    writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, 'utf8')), ...change }));
    for (const [name, content] of Object.entries(files)) writeFileSync(join(copy, name), content);
    return copy;
  }

  test('with add_bos_token and add_eos_token puts both around the text', async () => {
    const codec = await TextCodec.load(folder('gpt2-like', { add_bos_token: true, add_eos_token: true }));
    const plain = codec.encode('Hello', false);
    assert.deepEqual(codec.encode('Hello', true), [codec.info.bosId, ...plain, codec.info.eosId]);
  });

  test('whose post-processor adds the first token already gets it once', async () => {
    const codec = await TextCodec.load(folder('llama2-like', { add_bos_token: true }));
    assert.deepEqual(codec.encode('Hello', true), [codec.info.bosId, ...codec.encode('Hello', false)]);
  });

  test('reads special tokens that are objects, and special_tokens_map.json', async () => {
    const map = JSON.stringify({ eos_token: { content: '<|im_end|>', lstrip: false } });
    const codec = await TextCodec.load(folder('qwen-like', { eos_token: null }, { 'special_tokens_map.json': map }));
    assert.equal(codec.info.eosId, 2);
  });

  test('takes the stop tokens from generation_config.json, a number or a list', async () => {
    const generation = JSON.stringify({ eos_token_id: [0, 2, 7] });
    const codec = await TextCodec.load(folder('qwen-like', {}, { 'generation_config.json': generation }));
    assert.deepEqual(codec.info.eosIds, [2, 0, 7]);
  });

  test('takes the template from chat_template.json before tokenizer_config.json', async () => {
    const file = JSON.stringify({ chat_template: 'from the file: {{ messages[0].content }}' });
    const codec = await TextCodec.load(folder('gpt2-like', {}, { 'chat_template.json': file }));
    assert.equal(codec.template?.render([{ role: 'user', content: 'x' }], false), 'from the file: x');
  });

  test('with a template that uses tojson, strftime_now and generation blocks renders it', async () => {
    const template =
      "{{ {'a': [1, 'é']} | tojson }} {{ strftime_now('%Y') }} {% generation %}{{ messages[0].content }}{% endgeneration %}";
    const codec = await TextCodec.load(folder('gpt2-like', { chat_template: template }));
    const year = new Date().getFullYear();
    assert.equal(codec.template?.render([{ role: 'user', content: 'x' }], false), `{"a": [1, "é"]} ${year} x`);
  });

  test('with a malformed template is refused by the name of the file', async () => {
    const load = Tokenizer.load(folder('gpt2-like', { chat_template: '{% for %}' }));
    await assert.rejects(load, {
      code: 'INVALID_FILE',
      message: /tokenizer_config\.json: the chat template is malformed/,
    });
  });

  test('with malformed JSON is refused by the name of the file', async () => {
    const load = Tokenizer.load(folder('gpt2-like', {}, { 'tokenizer.json': '{"model": ' }));
    await assert.rejects(load, { code: 'INVALID_FILE', message: /tokenizer\.json: expected JSON/ });
  });

  test('with an unknown model is refused', async () => {
    const load = Tokenizer.load(folder('gpt2-like', {}, { 'tokenizer.json': '{"model": {"type": "Magic"}}' }));
    await assert.rejects(load, { code: 'INVALID_FILE', message: /tokenizer\.json is not a tokenizer/ });
  });

  test('without tokenizer.json is a missing file', async () => {
    await assert.rejects(Tokenizer.load(directory), { code: 'FILE_NOT_FOUND', message: /tokenizer\.json/ });
  });
});

test('a template is asked for by name where there is none', async () => {
  const tokenizer = await Tokenizer.load(join(fixtures, 'mistral-like'));
  const render = tokenizer.applyChatTemplate([{ role: 'user', content: 'x' }]);
  await assert.rejects(render, { code: 'UNSUPPORTED', message: /has no chat template/ });
  await tokenizer.dispose();
});

test('after dispose, calls reject', async () => {
  const tokenizer = await Tokenizer.load(join(fixtures, 'gpt2-like'));
  await tokenizer.dispose();
  await assert.rejects(tokenizer.encode('x'), { code: 'DISPOSED' });
});

test('wrong arguments are refused in one form', async () => {
  const tokenizer = await Tokenizer.load(join(fixtures, 'gpt2-like'));
  await assert.rejects(tokenizer.encode(3 as never), { code: 'INVALID_ARGUMENT', message: /Expected string for text/ });
  await assert.rejects(tokenizer.decode([-1]), { code: 'INVALID_ARGUMENT', message: /for ids but received -1/ });
  await assert.rejects(tokenizer.applyChatTemplate('x' as never), { code: 'INVALID_ARGUMENT' });
  await tokenizer.dispose();
});

test('ids that the tokenizer does not know decode to nothing', async () => {
  const tokenizer = await Tokenizer.load(join(fixtures, 'gpt2-like'));
  assert.equal(await tokenizer.decode([100000]), '');
  await tokenizer.dispose();
});

test('an aborted load rejects with ABORTED', async () => {
  const load = Tokenizer.load(join(fixtures, 'gpt2-like'), { signal: AbortSignal.abort() });
  await assert.rejects(load, { code: 'ABORTED' });
});

test('loading a large tokenizer leaves the event loop free', {
  skip: existsSync(smollm) ? false : `no ${smollm}`,
}, async () => {
  const delay = monitorEventLoopDelay({ resolution: 1 });
  const used = process.cpuUsage();
  delay.enable();
  const tokenizer = await Tokenizer.load(smollm);
  delay.disable();
  await tokenizer.dispose();
  const busy = process.cpuUsage(used).user / 1000;
  // JSON.parse and the merge table take well over 50 ms of some thread; the loop itself is to turn many times meanwhile.
  assert.ok(busy > 50 && delay.mean / 1e6 < 20, `busy ${busy} ms, mean delay ${delay.mean / 1e6} ms`);
});
