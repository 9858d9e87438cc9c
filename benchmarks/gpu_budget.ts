/**
 * What a step and an initialization should cost on a GPU, on paper: bytes and flops of every operation of the CUDA device, and the
 * time that a card of this bandwidth and peak needs for them at assumed efficiencies. Nothing here was measured; it says what the
 * first measurement is to be held against (scripts/gpu_first_hour.sh).
 *
 * tsx benchmarks/gpu_budget.ts [--tokens 8192] [--length 1024] [--rank 8] [--samples 256] [--sample-tokens 200]
 *                              [--bandwidth 3.35e12] [--peak 990e12] [--peak64 67e12] [--json]
 */
import { parseArgs } from 'node:util';
import { BenchmarkError, runMain } from './harness';

/** Llama-2-7B. */
const model = { layers: 32, hidden: 4096, intermediate: 11008, heads: 32, headDim: 128, vocabulary: 32000 };

/** Shares of the card's peak and bandwidth that the operations are assumed to reach. */
const assumed = { products: 0.75, attention: 0.4, memory: 0.85, float64: 0.6 };

/**
 * Seconds that an eigenproblem's small pieces take beside their bytes and flops: to enqueue one and to begin it, for the host to hear
 * that it may read, and for the host's own work in a step (the projected eigenproblem of order 100 at most). All are assumed.
 */
const latency = { launch: 5e-6, wait: 20e-6, hostWork: 0.5e-3 };

/**
 * What a search for the lowest eigenpairs takes (native/core/lowest_eigenpairs.h), counted by running it on the CPU. Typical: omegas
 * of SmolLM2-135M and GSM8K, all 210 modules, at most, with inversions priced as at order 11008. Harsh: the slowest of 23 made
 * spectra of orders 1024 and 2048. Launches and waits per step count the copies of small matrices too.
 */
const searches = {
  typical: { steps: 19, inversions: 0, launches: 27, waits: 4 },
  harsh: { steps: 80, inversions: 9, launches: 29, waits: 5 },
};
type Search = keyof typeof searches;

interface Row {
  part: string;
  operation: string;
  /** Over the whole pass. */
  bytes: number;
  flops: number;
  seconds: number;
  boundBy: 'bytes' | 'flops' | 'latency';
}

interface Card {
  bandwidth: number;
  peak: number;
  peak64: number;
}

function positive(name: string, text: string): number {
  const value = Number(text);
  if (value > 0 && Number.isFinite(value)) return value;
  throw new BenchmarkError(`Expected positive number for --${name} but received ${JSON.stringify(text)}`, 2);
}

class Budget {
  readonly rows: Row[] = [];
  constructor(private readonly card: Card) {}

  private add(part: string, operation: string, bytes: number, flops: number, seconds: number): void {
    const boundBy = seconds > (1.001 * bytes) / (assumed.memory * this.card.bandwidth) ? 'flops' : 'bytes';
    this.rows.push({ part, operation, bytes, flops, seconds, boundBy });
  }
  /** Small pieces one after another, of which neither bytes nor flops count. */
  waiting(part: string, operation: string, seconds: number): void {
    this.rows.push({ part, operation, bytes: 0, flops: 0, seconds, boundBy: 'latency' });
  }
  /** A product is bound by arithmetic, or by its operands where one side is thin. */
  product(part: string, operation: string, bytes: number, flops: number): void {
    const seconds = Math.max(
      flops / (assumed.products * this.card.peak),
      bytes / (assumed.memory * this.card.bandwidth),
    );
    this.add(part, operation, bytes, flops, seconds);
  }
  attention(part: string, operation: string, bytes: number, flops: number): void {
    this.add(part, operation, bytes, flops, flops / (assumed.attention * this.card.peak));
  }
  pass(part: string, operation: string, bytes: number): void {
    this.add(part, operation, bytes, 0, bytes / (assumed.memory * this.card.bandwidth));
  }
  float64(part: string, operation: string, bytes: number, flops: number): void {
    const seconds = Math.max(
      flops / (assumed.float64 * this.card.peak64),
      bytes / (assumed.memory * this.card.bandwidth),
    );
    this.add(part, operation, bytes, flops, seconds);
  }
  seconds(...parts: string[]): number {
    return this.rows.filter((row) => parts.includes(row.part)).reduce((sum, row) => sum + row.seconds, 0);
  }
  flops(...parts: string[]): number {
    return this.rows.filter((row) => parts.includes(row.part)).reduce((sum, row) => sum + row.flops, 0);
  }
}

/** A group of projections that read one input: widths, modules, and whether its input and output live in float32. */
interface Group {
  name: string;
  in: number;
  out: number;
  modules: number[];
  /** Adds to the float32 residual stream. */
  residual: boolean;
  /** Its input gradient is float32 (it goes into a norm). */
  normed: boolean;
}

const { hidden: h, intermediate: i, layers } = model;
const groups: Group[] = [
  { name: 'q/k/v', in: h, out: 3 * h, modules: [h, h, h], residual: false, normed: true },
  { name: 'o', in: h, out: h, modules: [h], residual: true, normed: false },
  { name: 'gate/up', in: h, out: 2 * i, modules: [i, i], residual: false, normed: true },
  { name: 'down', in: i, out: h, modules: [h], residual: true, normed: false },
];

function pass(budget: Budget, tokens: number, length: number, rank: number): void {
  const n = tokens * layers;
  for (const { name, in: width, out, modules, residual, normed } of groups) {
    const k = rank ? rank * modules.length : 0;
    const weight = 2 * layers * out * width;
    const stream = residual ? 8 : 0; // the float32 stream read and written, in place of a bfloat16 output
    const forward = weight + n * (2 * (width + k) + (residual ? stream : 2) * out);
    budget.product('forward', `${name}: x Wᵀ + LoRA`, forward, 2 * n * out * (width + k));
    const backward = weight + n * (2 * (out + k) + (normed ? 4 : 2) * width);
    budget.product('backward', `${name}: dy W + LoRA`, backward, 2 * n * width * (out + k));
    if (!rank) continue;
    budget.product('forward', `${name}: down = x aᵀ`, n * 2 * (width + k), 2 * n * width * k);
    budget.product('backward', `${name}: ddown = dy upᵀ`, n * 2 * (out + k), 2 * n * out * rank);
    budget.product('backward', `${name}: dB += downᵀ dy`, n * 2 * (out + k), 2 * n * out * rank);
    budget.product('backward', `${name}: dA += ddownᵀ x`, n * 2 * (width + k), 2 * n * width * k);
    budget.pass('forward', `${name}: factors beside the weight`, 2 * layers * 4 * k * (out + width) + 8 * n * k);
  }
  // Pairs of a query and a key that it sees, with the half-empty tiles of 64 on the diagonal.
  const pairs = (tokens / length) * ((length * (length + 64)) / 2) * model.heads * layers;
  budget.attention('forward', 'attention', n * 2 * 4 * h, 4 * model.headDim * pairs);
  budget.attention('backward', 'attentionGrad: dk, dv', n * 2 * 7 * h, 8 * model.headDim * pairs);
  budget.attention('backward', 'attentionGrad: dq', n * 2 * 5 * h, 6 * model.headDim * pairs);
  budget.pass('backward', 'attentionGrad: rows of dout · out', n * 2 * 2 * h);

  budget.pass('forward', 'rmsNorm (two)', 2 * n * (4 + 2 + 2) * h);
  budget.pass('forward', 'rope (q, k)', n * 2 * 2 * 2 * h);
  budget.pass('forward', 'gatedMlp', n * 2 * 3 * i);
  budget.pass('backward', 'rmsNormApply (two)', 2 * n * (2 + 2) * h);
  budget.pass('backward', 'gatedMlpGrad', n * 2 * (2 + 1 + 2 + 1) * i);
  budget.pass('backward', 'rmsNormGrad (two)', 2 * n * (2 + 4 + 4 + 4 + 2) * h);
  budget.pass('backward', 'ropeGrad (q, k)', n * 2 * 2 * 2 * h);

  const headFlops = 2 * tokens * h * model.vocabulary;
  budget.product('head', 'logits', 2 * h * model.vocabulary + tokens * (2 * h + 4 * model.vocabulary), headFlops);
  budget.pass('head', 'cross-entropy and its gradient', tokens * (4 + 2) * model.vocabulary);
  budget.product('head', 'dx', 2 * h * model.vocabulary + tokens * (4 * h + 2 * model.vocabulary), headFlops);
  budget.pass('head', 'embed, gather, scatter, final norm', tokens * (6 + 8 + 12 + 8 + 16) * h);
}

function optimizer(budget: Budget, rank: number): void {
  let factors = 0;
  for (const group of groups) factors += layers * rank * (group.modules.length * group.in + group.out);
  budget.pass('optimizer', 'gradient norm', 4 * factors);
  budget.pass('optimizer', 'AdamW', (4 * 4 + 3 * 4 + 2) * factors);
}

/** `count` problems of this order: each step reads omega, and the inverse where there is one, for a block of vectors. */
function eigenproblems(budget: Budget, name: string, order: number, count: number, rank: number, search: Search): void {
  const { steps, inversions, launches, waits } = searches[search];
  const part = `eigenproblems, ${search}`;
  const wanted = rank + 1;
  const block = Math.ceil((wanted + Math.max(8, Math.floor(wanted / 2))) / 8) * 8;
  const matrices = inversions ? 2 : 1;
  // Beside them products of the space, of up to four blocks, with itself, a block, and what is kept of it.
  const thin = 20 * block * order * 8;
  budget.float64(
    part,
    `${name}: ${count} of order ${order}, ${steps} steps`,
    count * steps * (matrices * 8 * order ** 2 + thin),
    count * steps * 2 * block * order * (matrices * order + 20 * block),
  );
  budget.waiting(
    part,
    `${name}: launches, waits and small problems of the steps`,
    count * steps * (launches * latency.launch + waits * latency.wait + latency.hostWork),
  );
  // Omega is copied and shifted for each; an inversion has a third of its flops in the factorization.
  const formed = count * (inversions + 1) * 4 * 8 * order ** 2;
  budget.float64(part, `${name}: inversions, certificate`, formed, count * (inversions + 1 / 3) * order ** 3);
}

/** Z's and its inverse's norm for each input and σ for each module: so many Lanczos steps as were counted at orders 576 and 1536. */
function norms(budget: Budget, name: string, width: number, modules: number[]): void {
  const [steps, launches, waits] = [30, 10, 2];
  const orders = [width, width, ...modules.map((rows) => Math.min(rows, width))];
  const elements = layers * steps * orders.reduce((sum, order) => sum + order ** 2, 0);
  budget.float64('solve', `${name}: norms and σ`, 8 * elements, 2 * elements);
  const each = launches * latency.launch + waits * latency.wait;
  budget.waiting('solve', `${name}: launches and waits of their steps`, layers * steps * orders.length * each);
}

function initialization(budget: Budget, tokens: number, rank: number): void {
  for (const { name, in: width, out, modules } of groups) {
    budget.product('collection', `${name}: G += dyᵀ x`, layers * 8 * out * width, 2 * tokens * layers * out * width);
    const moment = tokens * layers * width * width; // the lower triangle
    budget.float64(
      'collection',
      `${name}: Z += xᵀ x`,
      layers * 16 * width * width + tokens * layers * 18 * width,
      moment,
    );
    budget.pass('collection', `${name}: ydiag`, tokens * layers * 2 * out);

    const cube = width ** 3;
    budget.float64('solve', `${name}: Cholesky, inverse`, layers * 32 * width * width, layers * cube);
    const perModule = modules.map((rows) => 2 * width * width * rows + width * width * rows);
    const solveFlops = layers * perModule.reduce((sum, value) => sum + value, 0);
    budget.float64('solve', `${name}: Δ, Ω`, layers * 8 * modules.length * width * width * 3, solveFlops);
    norms(budget, name, width, modules);
    for (const search of Object.keys(searches) as Search[]) {
      eigenproblems(budget, name, width, layers * modules.length, rank, search);
    }
  }
}

function print(budget: Budget): void {
  const header = ['part', 'operation', 'GB', 'TFLOP', 'ms', 'bound by'];
  const lines = budget.rows.map((row) => [
    row.part,
    row.operation,
    (row.bytes / 1e9).toFixed(2),
    (row.flops / 1e12).toFixed(2),
    (row.seconds * 1e3).toFixed(2),
    row.boundBy,
  ]);
  for (const line of [header, header.map(() => '---'), ...lines]) console.log(`| ${line.join(' | ')} |`);
}

runMain(async () => {
  const { values } = parseArgs({
    options: {
      tokens: { type: 'string', default: '8192' },
      length: { type: 'string', default: '1024' },
      rank: { type: 'string', default: '8' },
      samples: { type: 'string', default: '256' },
      'sample-tokens': { type: 'string', default: '200' },
      bandwidth: { type: 'string', default: '3.35e12' },
      peak: { type: 'string', default: '990e12' },
      peak64: { type: 'string', default: '67e12' },
      json: { type: 'boolean', default: false },
    },
  });
  const number = (name: Exclude<keyof typeof values, 'json'>) => positive(name, values[name]);
  const card: Card = { bandwidth: number('bandwidth'), peak: number('peak'), peak64: number('peak64') };

  const step = new Budget(card);
  pass(step, number('tokens'), number('length'), number('rank'));
  optimizer(step, number('rank'));
  const parts = ['forward', 'backward', 'head', 'optimizer'];
  const stepSeconds = step.seconds(...parts);
  // A row of probabilities costs two products forward and five backward, whatever is computed twice.
  const needed =
    step.flops('forward', 'head', 'backward') -
    (step.rows.find((r) => r.operation.endsWith('dq'))?.flops ?? 0) * (2 / 3);
  const share = needed / stepSeconds / card.peak;

  const tokens = number('samples') * number('sample-tokens');
  const init = new Budget(card);
  pass(init, tokens, number('sample-tokens'), 0);
  initialization(init, tokens, number('rank'));
  const initSeconds = Object.fromEntries(
    [...new Set(init.rows.map((row) => row.part))].map((part) => [part, init.seconds(part)]),
  );
  const isSearch = (part: string) => part.startsWith('eigenproblems');
  const initTotal = (search: Search) =>
    Object.entries(initSeconds)
      .filter(([part]) => !isSearch(part) || part.endsWith(search))
      .reduce((sum, [, seconds]) => sum + seconds, 0);
  const initTotals = { typical: initTotal('typical'), harsh: initTotal('harsh') };

  if (values.json) {
    console.log(
      JSON.stringify({ card, assumed, stepSeconds, share, step: step.rows, initTotals, initSeconds, init: init.rows }),
    );
    return;
  }
  console.log(`Assumed shares: ${JSON.stringify(assumed)}; card: ${JSON.stringify(card)}\n`);
  print(step);
  const rate = number('tokens') / stepSeconds;
  console.log(`\nStep of ${values.tokens} tokens: ${(stepSeconds * 1e3).toFixed(0)} ms, ${rate.toFixed(0)} tokens/s`);
  console.log(
    `Share of the peak: ${(100 * share).toFixed(1)} % (${(needed / 1e12).toFixed(0)} TFLOP that the step needs)\n`,
  );
  print(init);
  console.log(
    `\nInitialization from ${tokens} tokens: ${initTotals.typical.toFixed(1)} s, ${initTotals.harsh.toFixed(1)} s with harsh eigenproblems`,
  );
  for (const [part, seconds] of Object.entries(initSeconds)) console.log(`  ${part}: ${seconds.toFixed(2)} s`);
});
