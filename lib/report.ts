import { readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { readOptionalJsonObject, writeFileAtomically } from './files';
import type { InitializationReport, ModuleReport } from './initializations';
import { type EvaluationMetrics, readJsonLines, type StepMetrics } from './metrics';
import { onDisk, runFiles } from './run_folder';

/** Steps that a chart shows at most; longer runs are averaged over neighbouring steps. */
const maximumPoints = 3000;
/** The smoothed loss looks back over about this part of a run. */
const smoothedPart = 0.05;

const stepFigures = ['loss', 'learningRate', 'gradNorm', 'tokensPerSecond'] as const;
const moduleFigures = ['conditionNumber', 'medianOutputOverDamping', 'sigma', 'relativeGap'] as const;

type StepFigure = (typeof stepFigures)[number];
type ModuleFigure = (typeof moduleFigures)[number];

interface StepSummary {
  steps: Record<'step' | 'smoothLoss' | StepFigure, number[]>;
  count: number;
  tokens: number;
  seconds: number;
  lastLoss: number | null;
}

/**
 * Writes `report.html` into a run folder, from what its other files say: one file that needs no network, with loss,
 * learning rate and gradient norm over the steps and what the initialization found per module.
 *
 * @param folder  a run folder (`--out` of train); a run still under way or stopped will do
 * @returns path of the report
 * @throws {LoraDaError} `IO_ERROR`, `INVALID_FILE`
 *
 * @example
 * ```ts
 * console.log(await writeReport('out')); // out/report.html
 * ```
 */
export async function writeReport(folder: string): Promise<string> {
  const config = (await readOptionalJsonObject(join(folder, runFiles.config))) ?? {};
  const found = await readOptionalJsonObject(join(folder, runFiles.initialization));
  const initialization = found as unknown as InitializationReport | undefined;
  const summary = await summarizeSteps(join(folder, runFiles.metrics));
  const evaluations: EvaluationMetrics[] = [];
  for await (const line of readJsonLines<EvaluationMetrics>(join(folder, runFiles.evaluations))) evaluations.push(line);
  const path = join(folder, runFiles.report);
  await writeFileAtomically(path, await page({ folder, config, initialization, summary, evaluations }));
  return path;
}

/** Reads the steps one by one; whenever there are too many points, neighbours become one. */
async function summarizeSteps(path: string): Promise<StepSummary> {
  const steps: StepSummary['steps'] = {
    step: [],
    smoothLoss: [],
    loss: [],
    learningRate: [],
    gradNorm: [],
    tokensPerSecond: [],
  };
  const summary: StepSummary = { steps, count: 0, tokens: 0, seconds: 0, lastLoss: null };
  let stride = 1;
  let group: StepMetrics[] = [];
  const flush = () => {
    if (group.length === 0) return;
    steps.step.push(group.at(-1)!.step);
    for (const figure of stepFigures) steps[figure].push(mean(group.map((line) => line[figure])));
    group = [];
  };
  for await (const line of readJsonLines<StepMetrics>(path)) {
    summary.count = line.step;
    summary.tokens += line.tokens;
    summary.seconds += line.tokens / line.tokensPerSecond || 0;
    summary.lastLoss = line.loss;
    group.push(line);
    if (group.length < stride) continue;
    flush();
    if (steps.step.length < 2 * maximumPoints) continue;
    halve(steps);
    stride *= 2;
  }
  flush();
  steps.smoothLoss = smooth(steps.loss);
  return summary;
}

function halve(steps: StepSummary['steps']): void {
  steps.step = steps.step.filter((_, i) => i % 2 === 1);
  for (const figure of stepFigures) {
    const values = steps[figure];
    steps[figure] = steps.step.map((_, i) => (values[2 * i]! + values[2 * i + 1]!) / 2);
  }
}

/** Exponential mean without the pull of its start (as Adam's bias correction). */
function smooth(values: number[]): number[] {
  const smoothing = Math.min(0.5, 1 / (smoothedPart * values.length));
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = (1 - smoothing) * sum + smoothing * value;
    weight = (1 - smoothing) * weight + smoothing;
    return sum / weight;
  });
}

const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Figures by layer (columns) and name within the layer (rows), for the charts. */
function moduleTable(modules: ModuleReport[]) {
  const placed = modules.map((module) => {
    const match = /\.(\d+)\.(?:.*\.)?([^.]+)$/.exec(module.module);
    return { module, layer: Number(match?.[1] ?? 0), name: match?.[2] ?? module.module };
  });
  const layers = [...new Set(placed.map(({ layer }) => layer))].sort((a, b) => a - b);
  const names = [...new Set(placed.map(({ name }) => name))];
  const at = new Map(placed.map(({ module, layer, name }) => [`${layer} ${name}`, module]));
  const grid = (figure: ModuleFigure) =>
    names.map((name) => layers.map((layer) => at.get(`${layer} ${name}`)?.[figure] ?? null));
  return { layers, names, figures: Object.fromEntries(moduleFigures.map((figure) => [figure, grid(figure)])) };
}

interface PageContent {
  folder: string;
  config: Record<string, unknown>;
  initialization: InitializationReport | undefined;
  summary: StepSummary;
  evaluations: EvaluationMetrics[];
}

async function page(content: PageContent): Promise<string> {
  const { folder, config, initialization, summary, evaluations } = content;
  const uplot = require.resolve('uplot/dist/uPlot.iife.min.js');
  const [library, libraryStyle, script, style] = await Promise.all(
    [uplot, require.resolve('uplot/dist/uPlot.min.css'), asset('report.js'), asset('report.css')].map((file) =>
      onDisk(file, () => readFile(file, 'utf8'), 'read'),
    ),
  );
  const data = {
    steps: summary.steps,
    evaluations: { step: evaluations.map(({ step }) => step), loss: evaluations.map(({ loss }) => loss) },
    modules: moduleTable(initialization?.modules ?? []),
  };
  const title = typeof config.model === 'string' ? basename(config.model) : basename(folder);
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeHtml(title)} · lora-da</title>
<style>${libraryStyle}</style>
<style>${style}</style>
</head>
<body>
<h1>${escapeHtml(title)}</h1>
<p class="muted">${escapeHtml(subtitle(config, initialization))}</p>
<div class="cards">${cards(summary, evaluations, initialization).join('')}</div>
<h2>Training</h2>
<div class="charts">
<div class="wide"><h3>Loss</h3><p class="hint">Mean cross-entropy per label token${config.evalData ? '; held-out rows as points' : ''}. Drag to zoom, double-click to go back.</p><div id="loss"></div></div>
${chart('learningRate', 'Learning rate', 'After each optimizer step.')}
${chart('gradNorm', 'Gradient norm', "L2 norm of the adapter's gradient before clipping.")}
<div class="wide"><h3>Speed</h3><p class="hint">Tokens per second of each step.</p><div id="tokensPerSecond"></div></div>
</div>
${initializationSection(initialization)}
${evaluationSection(evaluations)}
<h2>Configuration</h2>
<details class="wide"><summary>All options as resolved</summary>${configTable(config)}</details>
<footer class="muted">Written by lora-da.</footer>
<script type="application/json" id="data">${JSON.stringify(data).replaceAll('<', '\\u003c')}</script>
<script>${library}</script>
<script>${script}</script>
</body>
</html>
`;
}

const asset = (name: string) => join(__dirname, 'assets', name);

function chart(id: string, title: string, hint: string): string {
  return `<div class="chart"><h3>${title}</h3><p class="hint">${hint}</p><div id="${id}"></div></div>`;
}

function subtitle(config: Record<string, unknown>, initialization: InitializationReport | undefined): string {
  const start = initialization ? `started from ${initialization.method}` : undefined;
  const lora =
    config.rank === undefined
      ? undefined
      : `rank ${config.rank}, alpha ${config.alpha}${config.rslora ? ', rsLoRA' : ''}`;
  const data = typeof config.data === 'string' ? basename(config.data) : undefined;
  const rate =
    config.learningRate === undefined ? undefined : `learning rate ${config.learningRate} ${config.scheduler}`;
  return [data, lora, start, rate].filter((part) => part !== undefined).join(' · ');
}

function cards(
  summary: StepSummary,
  evaluations: EvaluationMetrics[],
  initialization: InitializationReport | undefined,
): string[] {
  const all: string[] = [];
  const first = evaluations[0];
  const last = evaluations.at(-1);
  if (first && last) {
    const best = evaluations.reduce((low, one) => (one.loss < low.loss ? one : low));
    all.push(
      card(
        'Held-out loss',
        `${first.loss.toFixed(3)} → ${last.loss.toFixed(3)}`,
        `best ${best.loss.toFixed(4)} at step ${best.step}`,
      ),
      card(
        'Held-out perplexity',
        `${short(first.perplexity)} → ${short(last.perplexity)}`,
        `${last.labelTokens.toLocaleString('en')} label tokens`,
      ),
    );
  }
  const smoothed = summary.steps.smoothLoss.at(-1);
  if (smoothed !== undefined) {
    all.push(card('Training loss', smoothed.toFixed(4), `smoothed; last step ${short(summary.lastLoss)}`));
  }
  all.push(card('Steps', summary.count.toLocaleString('en'), `${summary.tokens.toLocaleString('en')} tokens`));
  if (summary.seconds > 0) {
    all.push(
      card('Speed', `${short(summary.tokens / summary.seconds)} tokens/s`, `${duration(summary.seconds)} in steps`),
    );
  }
  if (initialization) {
    const seconds = initialization.collectSeconds + initialization.solveSeconds;
    const rows = initialization.samples > 0 ? `${initialization.samples} rows, ` : '';
    all.push(card('Initialization', escapeHtml(initialization.method), `${rows}${duration(seconds)}`));
  }
  return all;
}

function card(label: string, value: string, detail: string): string {
  return `<div class="card"><div class="label">${label}</div><div class="value">${value}</div><div class="detail">${detail}</div></div>`;
}

const figureTexts: Record<ModuleFigure, { title: string; hint: string }> = {
  conditionNumber: {
    title: 'Condition of the input moment',
    hint: 'cond(Zd), Zd = Z + damping·I. Large: a few directions carry nearly all of the input.',
  },
  medianOutputOverDamping: {
    title: 'Output factor over damping',
    hint: 'median(ydiag) / damping. Below 1, damping decides the output factor.',
  },
  sigma: { title: 'Estimated displacement', hint: 'σ, the largest singular value of Δ before it is normalized.' },
  relativeGap: {
    title: 'Eigenvalue gap',
    hint: 'After the r-th eigenvalue of Ω, over the largest. Small: the subspace is not sharply determined.',
  },
};

function initializationSection(initialization: InitializationReport | undefined): string {
  if (!initialization || initialization.modules.length === 0) return '';
  const { modules } = initialization;
  const figures = moduleFigures.filter((figure) => modules.some((module) => module[figure] !== null));
  const charts = figures.map((figure) => chart(figure, figureTexts[figure].title, figureTexts[figure].hint));
  const heads = ['module', 'rank', 'cond(Zd)', 'median(ydiag)/damping', 'σ', 'gap', 'relative gap'];
  const rows = modules.map(
    (module) =>
      `<tr><td>${escapeHtml(module.module)}</td><td>${module.rank}</td><td>${short(module.conditionNumber)}</td>` +
      `<td${(module.medianOutputOverDamping ?? 1) < 1 ? ' class="warn"' : ''}>${short(module.medianOutputOverDamping)}</td>` +
      `<td>${short(module.sigma)}</td><td>${short(module.gap)}</td><td>${short(module.relativeGap)}</td></tr>`,
  );
  const table = `<table><thead><tr>${heads.map((head) => `<th>${head}</th>`).join('')}</tr></thead><tbody>${rows.join('')}</tbody></table>`;
  const where =
    initialization.samples > 0
      ? `${initialization.samples} rows, ${initialization.options.tokenMask === 'labels' ? 'label positions' : 'all tokens'}; damping ${short(initialization.options.damping)}, gamma ${initialization.options.gamma}`
      : 'without data';
  return `<h2>What the initialization found</h2>
<p class="muted">${escapeHtml(initialization.method)}, ${escapeHtml(where)}; by layer, one line a kind of module.</p>
<div class="charts">${charts.join('')}
<details class="wide"${figures.length === 0 ? '' : ' open'}><summary>All ${modules.length} modules</summary><div class="scroll">${table}</div></details>
</div>`;
}

function evaluationSection(evaluations: EvaluationMetrics[]): string {
  if (evaluations.length === 0) return '';
  const rows = evaluations.map(
    ({ step, epoch, loss, perplexity }) =>
      `<tr><td>${step}</td><td>${epoch.toFixed(2)}</td><td>${loss.toFixed(5)}</td><td>${short(perplexity)}</td></tr>`,
  );
  return `<h2>Evaluations</h2>
<div class="wide scroll"><table><thead><tr><th>step</th><th>epoch</th><th>held-out loss</th><th>perplexity</th></tr></thead><tbody>${rows.join('')}</tbody></table></div>`;
}

function configTable(config: Record<string, unknown>): string {
  const rows = Object.entries(config).map(([name, value]) => {
    const shown = typeof value === 'string' ? value : JSON.stringify(value);
    return `<tr><td>${escapeHtml(name)}</td><td class="text">${escapeHtml(shown)}</td></tr>`;
  });
  return `<table><tbody>${rows.join('')}</tbody></table>`;
}

function short(value: number | null): string {
  if (value === null) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function duration(seconds: number): string {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const entities: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (character) => entities[character]!);
}
