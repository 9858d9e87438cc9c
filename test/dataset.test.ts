import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { Dataset, type DatasetOptions } from '../lib/dataset';
import { instructionPrompt } from '../lib/rows';
import { Tokenizer } from '../lib/tokenizer';

const fixtures = join(__dirname, 'fixtures', 'tokenizer');
const shared = join(__dirname, '..', '..', 'shared');
const folders: Record<string, string> = {
  smollm2: join(shared, 'models', 'SmolLM2-135M-Instruct'),
  'tiny-llama': join(fixtures, '..', 'tiny-llama'),
};

let directory: string;
let tokenizer: Tokenizer;
before(async () => {
  directory = mkdtempSync(join(tmpdir(), 'lora-da-'));
  tokenizer = await Tokenizer.load(join(fixtures, 'gpt2-like'));
});
after(async () => {
  await tokenizer.dispose();
  rmSync(directory, { recursive: true });
});

let files = 0;
function file(content: string | Buffer, extension = 'jsonl'): string {
  const path = join(directory, `data-${files++}.${extension}`);
  writeFileSync(path, content);
  return path;
}

const jsonl = (rows: unknown[]) => rows.map((row) => JSON.stringify(row)).join('\n');

/** Every row as plain lists. */
function listed(data: Dataset): { ids: number[]; labels: number[] }[] {
  return Array.from({ length: data.length }, (_, i) => {
    const { inputIds, labels } = data.row(i);
    return { ids: Array.from(inputIds), labels: Array.from(labels) };
  });
}

const idRow = (length: number, first = 1) => {
  const input_ids = Array.from({ length }, (_, i) => (first + i) % 100);
  return { input_ids, labels: input_ids };
};

describe('tokens and labels are those that transformers gives', () => {
  for (const kind of ['gpt2-like', 'qwen-like', 'llama2-like', 'mistral-like', 'tiny-llama', 'smollm2']) {
    const folder = folders[kind] ?? join(fixtures, kind);
    test(kind, { skip: existsSync(folder) ? false : `no ${folder}` }, async () => {
      const { pairs, chats } = JSON.parse(readFileSync(join(fixtures, `${kind}.json`), 'utf8'));
      const own = await Tokenizer.load(folder);
      const rows = [...pairs, ...chats.filter((chat: { refused?: string }) => !chat.refused)];
      // A row without a label is not in the data set.
      const expected = rows.filter(({ labels }) => labels.slice(1).some((label: number) => label !== -100));
      const data = await Dataset.load(
        rows.map(({ ids: _, labels: __, text: ___, ...row }) => row),
        { tokenizer: own },
      );
      assert.deepEqual(
        listed(data),
        expected.map(({ ids, labels }) => ({ ids, labels })),
      );
      await own.dispose();
    });
  }
});

describe('the fixed texts', () => {
  const same = async (row: unknown, prompt: string, completion: string) => {
    const [one, other] = await Promise.all([
      Dataset.load([row], { tokenizer }),
      Dataset.load([{ prompt, completion }], { tokenizer }),
    ]);
    assert.deepEqual(listed(one), listed(other));
  };

  test('question and answer', () => same({ question: 'Why?', answer: 'So.' }, 'Q: Why?\nA: ', 'So.'));

  test('instruction and output', () => {
    const prompt = instructionPrompt({ instruction: 'Count.' });
    assert.match(
      prompt,
      /^Below is an instruction that describes a task\. .*\n\n### Instruction:\nCount\.\n\n### Response:\n$/,
    );
    return same({ instruction: 'Count.', input: '', output: '1' }, prompt, '1');
  });

  test('instruction, input and output', () => {
    const prompt = instructionPrompt({ instruction: 'Count.', input: 'to 3' });
    assert.match(prompt, /paired with an input [\s\S]*\n\n### Input:\nto 3\n\n### Response:\n$/);
    return same({ instruction: 'Count.', input: 'to 3', output: '1' }, prompt, '1');
  });

  test('text is one completion', async () => {
    const [row] = listed(await Dataset.load([{ text: 'The fox counts' }], { tokenizer }));
    assert.deepEqual(row?.ids, row?.labels);
    assert.equal(row?.ids.at(-1), tokenizer.eosId);
  });
});

test('the end-of-sequence token is a label and is not put twice', async () => {
  const rows = [
    { prompt: 'The fox', completion: '' },
    { prompt: 'The fox', completion: '<|im_end|>' },
  ];
  const [empty, written] = listed(await Dataset.load(rows, { tokenizer }));
  assert.deepEqual(empty, written);
  assert.deepEqual(
    empty?.labels.filter((label) => label !== -100),
    [tokenizer.eosId],
  );
});

test('with trainOn all the prompt is a label too', async () => {
  const rows = [{ prompt: 'The fox', completion: ' counts' }, { messages: [{ role: 'user', content: 'Hi' }] }];
  const data = await Dataset.load(rows, { tokenizer, trainOn: 'all' });
  for (const { ids, labels } of listed(data)) assert.deepEqual(labels, ids);
  assert.equal(data.labelTokens(0), data.rowLength(0) - 1);
});

test('rows of ids are used as they are', async () => {
  const row = { input_ids: [5, 6, 7, 5], labels: [-100, 9, -100, 5] };
  const data = await Dataset.load([row, { input_ids: Int32Array.of(1, 2), labels: Int32Array.of(-100, 2) }], {
    vocabSize: 10,
  });
  assert.deepEqual(listed(data), [
    { ids: row.input_ids, labels: row.labels },
    { ids: [1, 2], labels: [-100, 2] },
  ]);
  assert.deepEqual([data.tokens, data.labelTokensTotal, data.labelTokens(0)], [6, 3, 2]);
});

test('a batch lays rows end to end in the order asked for', async () => {
  const data = await Dataset.load([idRow(3), idRow(2, 50), idRow(4, 70)]);
  const { inputIds, labels, sequenceStarts } = data.batch([2, 0]);
  assert.deepEqual(Array.from(inputIds), [70, 71, 72, 73, 1, 2, 3]);
  assert.deepEqual(labels, inputIds);
  assert.deepEqual(Array.from(sequenceStarts), [0, 4, 7]);
  assert.throws(() => data.batch([3]), { code: 'INVALID_ARGUMENT', message: /row number from 0 to 2/ });
});

test('a first label is none: nothing predicts it', async () => {
  const data = await Dataset.load([idRow(3), { input_ids: [1, 2], labels: [1, -100] }]);
  assert.deepEqual([data.length, data.dropped.unlabelled, data.labelTokensTotal], [1, 1, 2]);
});

describe('one content, one hash', () => {
  const rows = [
    { text: 'The fox' },
    { question: 'Wie?', answer: 'Größe, 東京' },
    idRow(5),
    { text: 'braces } ] , "quotes" \\' },
  ];
  const forms: Record<string, () => string | unknown[]> = {
    memory: () => rows,
    'a byte order mark, CRLF and blank lines': () =>
      file(`\ufeff\r\n${rows.map((row) => JSON.stringify(row)).join('\r\n  \r\n')}\r\n\r\n`),
    'a JSON array': () => file(JSON.stringify(rows), 'json'),
    'an indented JSON array': () => file(`\ufeff \n${JSON.stringify(rows, null, 4)}\n`, 'json'),
  };
  for (const [name, make] of Object.entries(forms)) {
    test(name, async () => {
      const plain = await Dataset.load(file(jsonl(rows)), { tokenizer });
      const data = await Dataset.load(make(), { tokenizer });
      assert.equal(data.hash, plain.hash);
      assert.equal(data.length, 4);
    });
  }

  test('another label is another hash', async () => {
    const one = await Dataset.load([{ input_ids: [1, 2, 3], labels: [-100, 2, 3] }]);
    const other = await Dataset.load([{ input_ids: [1, 2, 3], labels: [-100, -100, 3] }]);
    const split = await Dataset.load([
      { input_ids: [1, 2], labels: [-100, 2] },
      { input_ids: [3, 4], labels: [3, 4] },
    ]);
    assert.equal(new Set([one.hash, other.hash, split.hash]).size, 3);
  });
});

describe('files larger than a block', () => {
  const rows = Array.from({ length: 30000 }, (_, i) => idRow(20 + (i % 70), i));
  let whole: Dataset;
  before(async () => {
    whole = await Dataset.load(file(jsonl(rows)), { threads: 1 });
  });

  test('give the same with any number of threads', async () => {
    const data = await Dataset.load(file(jsonl(rows)), { threads: 3 });
    assert.equal(data.hash, whole.hash);
    assert.deepEqual(Array.from(data.row(29999).inputIds), rows[29999]?.input_ids);
  });

  test('give the same as a JSON array', async () => {
    const data = await Dataset.load(file(JSON.stringify(rows, null, 1), 'json'), { threads: 2 });
    assert.equal(data.hash, whole.hash);
  });

  test('give the same from memory', async () => {
    assert.equal((await Dataset.load(rows)).hash, whole.hash);
  });

  test('give the same when their tokens do not fit the budget of memory', async () => {
    const data = await Dataset.load(file(jsonl(rows)), { memoryBudget: 100_000 });
    assert.equal(data.hash, whole.hash);
    for (const i of [0, 1, 12345, 29999]) assert.deepEqual(data.row(i), whole.row(i));
    assert.deepEqual(data.batch([7, 29000]), whole.batch([7, 29000]));
    data.dispose();
  });

  test('name the line of an error far down', async () => {
    const broken = [...rows.slice(0, 25000), { text: 3 }, ...rows.slice(25000)];
    const message = /data-\d+\.jsonl:25001: expected a string for text, found a number$/;
    await assert.rejects(Dataset.load(file(jsonl(broken)), { tokenizer }), { code: 'INVALID_DATA', message });
    const array = file(`[${jsonl(broken).replaceAll('\n', ',\n')}]`, 'json');
    await assert.rejects(Dataset.load(array, { tokenizer }), {
      code: 'INVALID_DATA',
      message: /\.json:25001: expected a string/,
    });
    await assert.rejects(Dataset.load(broken, { tokenizer }), {
      code: 'INVALID_DATA',
      message: /^rows\[25000\]: expected/,
    });
  });

  test('report how far they are, and stop at the limit', async () => {
    const seen: number[] = [];
    const data = await Dataset.load(file(jsonl(rows)), { limit: 10, onProgress: ({ rows: done }) => seen.push(done) });
    assert.equal(data.length, 10);
    assert.equal(seen.at(-1), 10);
    assert.deepEqual(data.row(9), whole.row(9));
  });

  test('may hold one row larger than a block', async () => {
    const long = idRow(1_000_000);
    const data = await Dataset.load(file(jsonl([idRow(2), long, idRow(3)])), { maxLength: 2_000_000 });
    assert.deepEqual([data.rowLength(1), data.rowLength(2)], [1_000_000, 3]);
  });
});

describe('rows over maxLength', () => {
  const rows = [idRow(4), idRow(9)];
  const load = (overlong: DatasetOptions['overlong']) => Dataset.load(file(jsonl(rows)), { maxLength: 6, overlong });

  test('are cut', async () => {
    const data = await load('truncate');
    assert.deepEqual([data.length, data.rowLength(1), data.truncated], [2, 6, 1]);
  });

  test('are left out and counted', async () => {
    const data = await load('drop');
    assert.deepEqual([data.length, data.dropped], [1, { overlong: 1, unlabelled: 0 }]);
  });

  test('are an error', () =>
    assert.rejects(load('error'), {
      code: 'INVALID_DATA',
      message: /:2: expected at most 6 tokens \(maxLength\), found 9/,
    }));

  test('are left out where the cut takes all labels', async () => {
    const row = { input_ids: [1, 2, 3, 4], labels: [-100, -100, -100, 4] };
    const data = await Dataset.load([row, idRow(2)], { maxLength: 3 });
    assert.deepEqual([data.length, data.dropped.unlabelled], [1, 1]);
  });
});

test('no label anywhere is an error', async () => {
  const rows = [{ input_ids: [1, 2], labels: [-100, -100] }, { messages: [{ role: 'user', content: 'Hi' }] }];
  const load = Dataset.load(file(jsonl(rows)), { tokenizer });
  await assert.rejects(load, {
    code: 'NO_LABELS',
    message: /data-\d+\.jsonl: no row is left to train on: 2 without a label/,
  });
});

describe('a malformed row is named by file, line and field', () => {
  const cases: [string, string | Buffer, RegExp][] = [
    ['not JSON', '{"text": "a"}\n{"text": ', /:2: expected a JSON object, unexpected end/],
    ['not an object', '[1]\n', /:1: expected a JSON object/],
    ['a bare string', '"text"', /:1: expected a JSON object/],
    ['no known field', '{"foo": "secret"}', /:1: expected input_ids and labels, messages, prompt and completion/],
    ['a prompt alone', '{"prompt": "x"}', /:1: expected a string for completion, it is missing/],
    ['a list for text', '{"text": ["x"]}', /:1: expected a string for text, found a list/],
    ['ids without labels', '{"input_ids": [1]}', /:1: expected a list of integers for labels, it is missing/],
    [
      'ids that are not integers',
      '{"input_ids": [1, 2.5], "labels": [1, 2]}',
      /for input_ids, found another value at 1/,
    ],
    ['ragged lengths', '{"input_ids": [1, 2], "labels": [1]}', /:1: expected 2 entries for labels, .* found 1/],
    ['no ids', '{"input_ids": [], "labels": []}', /:1: expected at least one token for input_ids/],
    [
      'an id outside the vocabulary',
      '{"input_ids": [1, 420], "labels": [1, 2]}',
      /from 0 to 419 for input_ids, found 420 at 1/,
    ],
    ['a negative id', '{"input_ids": [-1], "labels": [1]}', /for input_ids, found -1 at 0/],
    [
      'a label outside the vocabulary',
      '{"input_ids": [1], "labels": [-5]}',
      /expected -100 or ids from 0 to 419 for labels, found -5/,
    ],
    ['no messages', '{"messages": []}', /at least one message for messages/],
    ['a message without a role', '{"messages": [{"content": "x"}]}', /expected a string for messages\[0\]\.role/],
    [
      'a message with a number',
      '{"messages": [{"role": "user", "content": 3}]}',
      /expected a string for messages\[0\]\.content/,
    ],
    [
      'bytes that are not UTF-8',
      Buffer.from('{"text": "a"}\n\n{"text": "\xe9"}\n', 'latin1'),
      /:3: expected UTF-8 text/,
    ],
    ['an empty file', '', /expected at least one row, found none/],
    ['blank lines only', '\n \n', /expected at least one row, found none/],
    ['an empty array', ' [ ] ', /expected at least one row, found none/],
    ['an array that does not end', '[{"text": "a"}', /:1: expected \] at the end of the array/],
    ['something after the array', '[{"text": "a"}]\nx', /:2: expected nothing after the end of the array/],
    ['a comma too many', '[{"text": "a"},\n]', /:\d: expected a JSON object/],
  ];
  for (const [name, content, message] of cases) {
    test(name, async () => {
      await assert.rejects(Dataset.load(file(content), { tokenizer }), (error: Error & { code: string }) => {
        assert.equal(error.code, 'INVALID_DATA');
        assert.match(error.message, message);
        assert.match(error.message, /data-\d+\.jsonl/);
        assert.doesNotMatch(error.message, /secret/);
        return true;
      });
    });
  }
});

test('text without a tokenizer is refused', async () => {
  await assert.rejects(Dataset.load([{ text: 'x' }]), { code: 'INVALID_DATA', message: /the model has no tokenizer/ });
});

test('messages without a chat template are refused', async () => {
  const own = await Tokenizer.load(join(fixtures, 'mistral-like'));
  const load = Dataset.load([{ messages: [{ role: 'user', content: 'x' }] }], { tokenizer: own });
  await assert.rejects(load, { code: 'INVALID_DATA', message: /expected a model with a chat template for messages/ });
  await own.dispose();
});

test('a template whose turns are not prefixes of the conversation is named, with the row', async () => {
  const folder = join(directory, 'strange');
  cpSync(join(fixtures, 'gpt2-like'), folder, { recursive: true });
  writeFileSync(
    join(folder, 'chat_template.jinja'),
    '{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}',
  );
  const own = await Tokenizer.load(folder);
  const rows = [
    { text: 'x' },
    {
      messages: [
        { role: 'user', content: 'a' },
        { role: 'assistant', content: 'b' },
      ],
    },
  ];
  const message = /^rows\[1\]: the chat template of .*chat_template\.jinja does not render messages\[1\] after/;
  await assert.rejects(Dataset.load(rows, { tokenizer: own }), { code: 'INVALID_DATA', message });
  await own.dispose();
});

test('files that are missing or of another format are named', async () => {
  await assert.rejects(Dataset.load(join(directory, 'none.jsonl')), { code: 'FILE_NOT_FOUND', message: /none\.jsonl/ });
  await assert.rejects(Dataset.load(file('a,b', 'csv')), { code: 'UNSUPPORTED', message: /CSV is not supported/ });
  await assert.rejects(Dataset.load(directory), { code: 'INVALID_DATA', message: /expected a file, found a folder/ });
});

test('wrong options are refused in one form', async () => {
  const cases: [DatasetOptions, RegExp][] = [
    [{ maxLength: 0 }, /Expected positive integer for maxLength but received 0/],
    [{ overlong: 'cut' as never }, /Expected one of truncate, drop, error for overlong/],
    [{ trainOn: 'prompt' as never }, /for trainOn/],
    [{ limit: 1.5 }, /for limit/],
  ];
  for (const [options, message] of cases) {
    await assert.rejects(Dataset.load([idRow(2)], options), { code: 'INVALID_ARGUMENT', message });
  }
  await assert.rejects(Dataset.load(3 as never), { code: 'INVALID_ARGUMENT' });
});

test('an aborted load rejects with ABORTED', async () => {
  const path = file(jsonl(Array.from({ length: 20000 }, () => idRow(50))));
  const controller = new AbortController();
  const load = Dataset.load(path, { signal: controller.signal, onProgress: () => controller.abort() });
  await assert.rejects(load, { code: 'ABORTED' });
});

test('after dispose, rows are refused', async () => {
  const data = await Dataset.load([idRow(2)]);
  data.dispose();
  data.dispose();
  assert.throws(() => data.row(0), { code: 'DISPOSED' });
});

const inputs = join(shared, 'reference', 'llama-tied', 'inputs.jsonl');
test('the reference rows load with their label counts', {
  skip: existsSync(inputs) ? false : `no ${inputs}`,
}, async () => {
  const { labelTokens } = JSON.parse(readFileSync(join(shared, 'reference', 'llama-tied', 'expected.json'), 'utf8'));
  const data = await Dataset.load(inputs, { vocabSize: 160 });
  assert.deepEqual(
    Array.from({ length: data.length }, (_, i) => data.labelTokens(i)),
    labelTokens,
  );
});
