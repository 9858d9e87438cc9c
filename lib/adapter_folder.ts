import { access, mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { LoraDaError } from './errors';
import { fileError, readJsonObject, writeFileAtomically } from './files';
import type { DecoderSpec, LinearSpec, NativeFactors } from './native';
import { isFileDtype, readSafetensorsHeader, readTensors, type TensorInfo, writeSafetensors } from './safetensors';
import { linearModules, matchesTarget, suffixesOf } from './target_modules';

/** What a PEFT folder says. */
export interface AdapterFolder {
  directory: string;
  rank: number;
  alpha: number;
  rslora: boolean;
  /** alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA. */
  scaling: number;
  /** `lora_dropout` of the file. lora-da trains without it. */
  dropout: number;
  /** Full names of the adapted modules, in layer order. */
  modules: string[];
  /** The shortest list that names them, sorted: what `target_modules` says when it is written again. */
  suffixes: string[];
  /** `base_model_name_or_path`; empty where the file has none. */
  baseModel: string;
  /** One entry per module, in the order of `modules`. */
  factors: NativeFactors[];
}

/** What `writeAdapterFolder` needs. */
export interface AdapterContent {
  rank: number;
  alpha: number;
  rslora: boolean;
  factors: readonly NativeFactors[];
  /** Written as `base_model_name_or_path` (default empty). */
  baseModel?: string;
}

const configName = 'adapter_config.json';
const weightsName = 'adapter_model.safetensors';
const keyPrefix = 'base_model.model.';

/** Options of PEFT that change what an adapter computes and that lora-da lacks, refused when they are set. */
const refusedOptions = [
  'use_dora',
  'use_qalora',
  'use_bdlora',
  'lora_bias',
  'fan_in_fan_out',
  'modules_to_save',
  'rank_pattern',
  'alpha_pattern',
  'layers_to_transform',
  'layer_replication',
  'exclude_modules',
  'trainable_token_indices',
  'target_parameters',
  'alora_invocation_tokens',
  'arrow_config',
  'kasa_config',
  'velora_config',
  'monteclora_config',
  'megatron_config',
];

/** Starts that change the base weights when PEFT loads the adapter; `true` and the others leave them alone. */
const baseChangingStarts = /^(pissa|olora|corda|loftq|lora_?ga)/i;

/** scaling = alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA. */
export function loraScaling(rank: number, alpha: number, rslora: boolean): number {
  return alpha / (rslora ? Math.sqrt(rank) : rank);
}

/**
 * Reads a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) for a decoder.
 *
 * @param directory  path of the folder
 * @param spec       the decoder that the adapter is for
 * @throws {LoraDaError} `UNSUPPORTED` for an option that lora-da lacks (by name), `INVALID_CONFIG` for a malformed field or
 *   targets that are not in the model, `INVALID_TENSOR` for a factor that is missing, extra, misshapen or of the wrong
 *   type, `FILE_NOT_FOUND`, `FILE_TRUNCATED`, `INVALID_FILE`, `IO_ERROR`
 * @example
 * ```ts
 * const { rank, scaling, factors } = await readAdapterFolder('out', checkpoint.spec);
 * ```
 */
export async function readAdapterFolder(directory: string, spec: DecoderSpec): Promise<AdapterFolder> {
  const file = join(directory, configName);
  const config = await readJsonObject(file);
  const type = config.peft_type;
  if (type !== 'LORA')
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: peft_type ${type === undefined ? 'is missing' : `${JSON.stringify(type)} is not supported`}; expected "LORA"`,
    );
  refuseOptions(config, file);
  const rank = config.r;
  if (!Number.isInteger(rank) || (rank as number) < 1) throw badField(file, 'r', 'a positive integer', rank);
  const alpha = numberField(config, file, 'lora_alpha', 8);
  const rslora = booleanField(config, file, 'use_rslora');
  const linears = selectModules(spec, config.target_modules, file);
  const modules = [...linears.keys()];
  return {
    directory,
    rank: rank as number,
    alpha,
    rslora,
    scaling: loraScaling(rank as number, alpha, rslora),
    dropout: numberField(config, file, 'lora_dropout', 0),
    modules,
    suffixes: suffixesOf(spec, modules),
    baseModel: typeof config.base_model_name_or_path === 'string' ? config.base_model_name_or_path : '',
    factors: await readFactors(directory, linears, rank as number),
  };
}

/**
 * Writes a PEFT folder that PEFT, vLLM and llama.cpp's converter read. Each of the two files appears whole or not at all,
 * the configuration last.
 *
 * @param directory  path of the folder; made where it does not exist
 * @param spec       the decoder that the adapter is for
 * @throws {LoraDaError} `IO_ERROR`: names the file
 */
export async function writeAdapterFolder(directory: string, spec: DecoderSpec, adapter: AdapterContent): Promise<void> {
  const linears = linearModules(spec);
  const tensors = adapter.factors.flatMap(({ module, a, b }) => {
    const linear = linears.get(module);
    if (!linear) throw new LoraDaError('INTERNAL', `Module ${module} is not in the model`);
    return [
      { name: factorKey(module, 'A'), shape: [adapter.rank, linear.in], data: a },
      { name: factorKey(module, 'B'), shape: [linear.out, adapter.rank], data: b },
    ];
  });
  tensors.sort((x, y) => (x.name < y.name ? -1 : 1));
  try {
    await mkdir(directory, { recursive: true });
  } catch (error) {
    throw fileError(error, directory, 'write');
  }
  await writeSafetensors(join(directory, weightsName), tensors);
  await writeFileAtomically(join(directory, configName), `${JSON.stringify(peftConfig(spec, adapter), null, 2)}\n`);
}

/** adapter_config.json as PEFT 0.21 writes it, keys sorted. Options that PEFT's defaults cover are left to them. */
function peftConfig(spec: DecoderSpec, adapter: AdapterContent): Record<string, unknown> {
  return {
    alpha_pattern: {},
    auto_mapping: null,
    base_model_name_or_path: adapter.baseModel ?? '',
    bias: 'none',
    exclude_modules: null,
    fan_in_fan_out: false,
    inference_mode: true,
    init_lora_weights: true,
    layer_replication: null,
    layers_pattern: null,
    layers_to_transform: null,
    lora_alpha: adapter.alpha,
    lora_bias: false,
    lora_dropout: 0.0,
    modules_to_save: null,
    peft_type: 'LORA',
    r: adapter.rank,
    rank_pattern: {},
    revision: null,
    target_modules: suffixesOf(
      spec,
      adapter.factors.map(({ module }) => module),
    ),
    task_type: 'CAUSAL_LM',
    use_dora: false,
    use_rslora: adapter.rslora,
  };
}

function refuseOptions(config: Record<string, unknown>, file: string): void {
  for (const option of refusedOptions) {
    const value = config[option];
    const isSet = typeof value === 'object' && value !== null ? Object.keys(value).length > 0 : Boolean(value);
    // Layer 0 alone, or token 0, is a choice too.
    if (isSet || value === 0) throw new LoraDaError('UNSUPPORTED', `${file}: ${option} is not supported`);
  }
  if ((config.bias ?? 'none') !== 'none') {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: bias ${JSON.stringify(config.bias)} is not supported; expected "none"`,
    );
  }
  const task = config.task_type ?? 'CAUSAL_LM';
  if (task !== 'CAUSAL_LM') {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: task_type ${JSON.stringify(task)} is not supported; expected "CAUSAL_LM"`,
    );
  }
  const start = config.init_lora_weights;
  if (typeof start === 'string' && baseChangingStarts.test(start)) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: init_lora_weights ${JSON.stringify(start)} belongs to a changed base; save the adapter converted to plain LoRA`,
    );
  }
}

function selectModules(spec: DecoderSpec, targets: unknown, file: string): Map<string, LinearSpec> {
  const all = linearModules(spec);
  const matches = targetMatcher(targets, file);
  for (const other of ['lm_head', 'model.embed_tokens']) {
    if (targets !== 'all-linear' && matches(other)) {
      throw new LoraDaError('UNSUPPORTED', `${file}: target_modules covers ${other}, which is not supported`);
    }
  }
  const selected = new Map([...all].filter(([module]) => matches(module)));
  if (selected.size > 0) return selected;
  const known = suffixesOf(spec, [...all.keys()]).join(', ');
  throw new LoraDaError('INVALID_CONFIG', `${file}: target_modules selects no module of the model; known are ${known}`);
}

/** PEFT's rule: a list of names or suffixes, `all-linear`, or a regular expression that matches the whole name. */
function targetMatcher(targets: unknown, file: string): (module: string) => boolean {
  if (Array.isArray(targets) && targets.length > 0 && targets.every((target) => typeof target === 'string')) {
    return (module) => targets.some((target) => matchesTarget(module, target));
  }
  if (typeof targets !== 'string' || targets === '') {
    throw badField(file, 'target_modules', "a list of names, a regular expression or 'all-linear'", targets);
  }
  if (targets.toLowerCase() === 'all-linear') return () => true;
  let pattern: RegExp;
  try {
    pattern = new RegExp(`^(?:${targets})$`);
  } catch (error) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: target_modules is not a regular expression that JavaScript understands`,
      {
        cause: error,
      },
    );
  }
  return (module) => pattern.test(module);
}

async function readFactors(
  directory: string,
  linears: Map<string, LinearSpec>,
  rank: number,
): Promise<NativeFactors[]> {
  const file = join(directory, weightsName);
  if (await isPickled(directory, file)) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${join(directory, 'adapter_model.bin')} is not supported; expected ${weightsName}`,
    );
  }
  const { tensors } = await readSafetensorsHeader(file);
  const infos: TensorInfo[] = [];
  for (const [module, linear] of linears) {
    infos.push(checkFactor(file, tensors, factorKey(module, 'A'), [rank, linear.in]));
    infos.push(checkFactor(file, tensors, factorKey(module, 'B'), [linear.out, rank]));
  }
  const expected = new Set(infos.map(({ name }) => name));
  for (const name of tensors.keys()) {
    if (!expected.has(name)) {
      throw new LoraDaError(
        'INVALID_TENSOR',
        `Tensor ${name} of ${file} does not belong to the modules that ${configName} names`,
      );
    }
  }
  const values = await readTensors(file, infos);
  return [...linears.keys()].map((module, i) => ({ module, a: values[2 * i]!, b: values[2 * i + 1]! }));
}

function checkFactor(file: string, tensors: Map<string, TensorInfo>, name: string, shape: number[]): TensorInfo {
  const info = tensors.get(name);
  const expected = `expected shape [${shape.join(', ')}]`;
  if (!info) throw new LoraDaError('INVALID_TENSOR', `Tensor ${name} is missing from ${file}, ${expected}`);
  if (info.shape.join() !== shape.join()) {
    throw new LoraDaError('INVALID_TENSOR', `Tensor ${name} of ${file}: ${expected}, found [${info.shape.join(', ')}]`);
  }
  if (!isFileDtype(info.dtype)) {
    throw new LoraDaError(
      'INVALID_TENSOR',
      `Tensor ${name} of ${file}: expected F32, F16 or BF16, found ${info.dtype}`,
    );
  }
  return info;
}

async function isPickled(directory: string, safetensors: string): Promise<boolean> {
  const there = (file: string) =>
    access(file).then(
      () => true,
      () => false,
    );
  return !(await there(safetensors)) && (await there(join(directory, 'adapter_model.bin')));
}

function factorKey(module: string, factor: 'A' | 'B'): string {
  return `${keyPrefix}${module}.lora_${factor}.weight`;
}

function numberField(config: Record<string, unknown>, file: string, field: string, fallback: number): number {
  const value = config[field] ?? fallback;
  if (typeof value === 'number' && Number.isFinite(value)) return value;
  throw badField(file, field, 'a number', value);
}

function booleanField(config: Record<string, unknown>, file: string, field: string): boolean {
  const value = config[field] ?? false;
  if (typeof value === 'boolean') return value;
  throw badField(file, field, 'true or false', value);
}

function badField(file: string, field: string, what: string, value: unknown): LoraDaError {
  const shown = value === undefined ? 'it is missing' : `found ${JSON.stringify(value).slice(0, 80)}`;
  return new LoraDaError('INVALID_CONFIG', `${file}: expected ${what} for ${field}, ${shown}`);
}
