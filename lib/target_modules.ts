import { LoraDaError } from './errors';
import type { DecoderSpec, LinearSpec } from './native';

/** The linear modules that an adapter covers. */
export interface TargetModules {
  /** Full names in layer order, within a layer in the order of the forward pass: `model.layers.0.self_attn.q_proj`. */
  modules: string[];
  /** What `target_modules` of an adapter_config.json says: sorted, as short as it may be. */
  suffixes: string[];
}

/** The linear modules of one decoder layer, in the order of the forward pass. */
export function linearSpecsOf(spec: DecoderSpec): LinearSpec[] {
  return [...spec.attentionInputs, spec.attentionOutput, ...spec.mlpInputs, spec.mlpOutput];
}

/** Full name of a module: `model.layers.0.self_attn.q_proj`. */
export function moduleName(spec: DecoderSpec, layer: number, linear: LinearSpec): string {
  return `${spec.names.layer.replace('{i}', String(layer))}.${linear.name}`;
}

/** Every linear module of the decoder's layers (the head is not one of them), by full name in layer order. */
export function linearModules(spec: DecoderSpec): Map<string, LinearSpec> {
  const all = new Map<string, LinearSpec>();
  for (let layer = 0; layer < spec.layers; layer++) {
    for (const linear of linearSpecsOf(spec)) all.set(moduleName(spec, layer, linear), linear);
  }
  return all;
}

/**
 * The modules that `targets` selects, by PEFT's rule: a name selects the modules that are called so or end in `.name`.
 *
 * @param spec     the decoder
 * @param targets  `'all-linear'` (every linear module of the layers, not the head), or names: suffixes such as `q_proj` or
 *   `self_attn.q_proj`, or full names
 * @throws {LoraDaError} `INVALID_ARGUMENT` for a name that selects nothing, listing the known ones, and for an empty list
 * @example
 * ```ts
 * resolveTargetModules(spec, ['q_proj', 'v_proj']).modules; // ['model.layers.0.self_attn.q_proj', …]
 * ```
 */
export function resolveTargetModules(spec: DecoderSpec, targets: 'all-linear' | readonly string[]): TargetModules {
  if (targets === 'all-linear') {
    return { modules: [...linearModules(spec).keys()], suffixes: knownSuffixes(spec) };
  }
  if (!Array.isArray(targets) || targets.length === 0) {
    throw new LoraDaError('INVALID_ARGUMENT', `Expected 'all-linear' or a list of module names for targetModules`);
  }
  const all = [...linearModules(spec).keys()];
  const selected = new Set<string>();
  for (const target of targets) {
    const found = all.filter((module) => matchesTarget(module, target));
    if (found.length === 0) {
      throw new LoraDaError(
        'INVALID_ARGUMENT',
        `Target module ${JSON.stringify(target)} is not in the model; known are ${knownSuffixes(spec).join(', ')}, or 'all-linear'`,
      );
    }
    for (const module of found) selected.add(module);
  }
  return { modules: all.filter((module) => selected.has(module)), suffixes: [...new Set(targets)].sort() };
}

/**
 * The shortest list of names that selects exactly `modules`: suffixes where a module is covered in every layer, full
 * names elsewhere; sorted.
 */
export function suffixesOf(spec: DecoderSpec, modules: readonly string[]): string[] {
  const covered = new Set(modules);
  const names = new Set<string>();
  for (const linear of linearSpecsOf(spec)) {
    const everywhere = Array.from({ length: spec.layers }, (_, layer) => moduleName(spec, layer, linear));
    const present = everywhere.filter((module) => covered.has(module));
    if (present.length === spec.layers) names.add(lastPart(linear.name));
    else for (const module of present) names.add(module);
  }
  return [...names].sort();
}

/** PEFT's rule for one entry of a `target_modules` list. */
export function matchesTarget(module: string, target: string): boolean {
  return module === target || module.endsWith(`.${target}`);
}

function knownSuffixes(spec: DecoderSpec): string[] {
  return linearSpecsOf(spec)
    .map(({ name }) => lastPart(name))
    .sort();
}

function lastPart(name: string): string {
  return name.slice(name.lastIndexOf('.') + 1);
}
