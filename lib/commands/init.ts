import { expected } from '../arguments';
import { initSchema, parseOptions } from '../config';
import { LoraDaError } from '../errors';
import { describePlan, type ModuleReport, needsData, phaseNames, summarizeInitialization } from '../initializations';
import { checkWritable, namesIn, runFiles } from '../run_folder';
import type { CommandContext } from './context';
import { flagOf } from './flags';
import { loadData, withModel } from './load';

/** `lora-da init` */
export async function init(given: Record<string, unknown>, context: CommandContext): Promise<object> {
  const config = parseOptions(initSchema, given, { nameOf: flagOf });
  const collects = needsData(config.init);
  if (collects && config.data === undefined) throw expected('path of a data file', '--data', config.data);
  if ((await namesIn(config.out)).includes(runFiles.metrics)) {
    throw new LoraDaError('INVALID_ARGUMENT', `${config.out} holds a training run: give another --out`);
  }
  await checkWritable(config.out);
  const { rank, alpha, rslora, targetModules, samples, tokenMask, population, varianceWeight, biasWeight } = config;
  const { gamma, damping, outputDamping, normalizeDelta, plan, memoryBudget, seed } = config;
  return withModel(config, context, async (model) => {
    const adapter = model.addLora({ rank, alpha, rslora, targetModules });
    // With N given, the rows after the first `samples` do not matter.
    const limit = population === undefined ? undefined : samples;
    const data = collects ? await loadData(config.data!, config, model, context, limit) : undefined;
    const report = await adapter.initialize(
      {
        method: config.init,
        ...{ samples, tokenMask, population, varianceWeight, biasWeight },
        ...{ gamma, damping, outputDamping, normalizeDelta, plan, memoryBudget, seed },
      },
      data,
      {
        signal: context.signal,
        onPlan: (plan) => context.progress.line(describePlan(plan)),
        onProgress: (phase, done, total) => {
          if (done <= 1) context.progress.begin(phaseNames[phase], total);
          context.progress.update(done);
        },
      },
    );
    await data?.dispose();
    await adapter.save(config.out);
    context.progress.end();
    if (collects) for (const line of table(report.modules)) context.print(line);
    context.print(summarizeInitialization(report));
    context.print(`Adapter: ${config.out}`);
    return { ...report, out: config.out };
  });
}

const columns: { head: string; cell: (module: ModuleReport) => string }[] = [
  { head: 'module', cell: ({ module }) => module },
  { head: 'cond(Zd)', cell: ({ conditionNumber }) => figure(conditionNumber) },
  { head: 'median(ydiag)/damping', cell: ({ medianOutputOverDamping }) => figure(medianOutputOverDamping) },
  { head: 'sigma', cell: ({ sigma }) => figure(sigma) },
  { head: 'relative gap', cell: ({ relativeGap }) => figure(relativeGap) },
];

function table(modules: ModuleReport[]): string[] {
  const rows = [columns.map(({ head }) => head), ...modules.map((module) => columns.map(({ cell }) => cell(module)))];
  const widths = columns.map((_, i) => Math.max(...rows.map((row) => row[i]!.length)));
  return rows.map((row) =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  '),
  );
}

function figure(value: number | null): string {
  return value === null ? '–' : value.toExponential(2);
}
