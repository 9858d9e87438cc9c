import { LoraDaError } from '../errors';
import { type NativeAddon, type NativeDevice, native } from '../native';
import type { CommandContext } from './context';

/** `lora-da info` */
export async function info(_given: Record<string, unknown>, { print }: CommandContext): Promise<object> {
  const version = (require('../../package.json') as { version: string }).version;
  const addon = nativeAddon();
  const { devices, libraries } = await addon.devices();
  const info = addon.info();
  const found = { ...info, devices, libraries: { ...info.libraries, ...libraries } };
  print(`lora-da ${version}, Node ${process.versions.node}`);
  print(
    `CPU: ${found.isa}, ${found.threads} threads, ${found.bfloat16 ? 'multiplies bfloat16' : 'no bfloat16 products'}`,
  );
  for (const device of found.devices) print(describeDevice(device));
  for (const [name, text] of Object.entries(found.libraries)) print(`Library ${name}: ${text}`);
  print(`Initializations: ${found.initializations.map(({ name }) => name).join(', ')}`);
  return { version, node: process.versions.node, core: found };
}

function describeDevice({ name, model, usable, reason, memory, computeCapability }: NativeDevice): string {
  const facts = [
    model,
    memory > 0 && `${(memory / 1e9).toFixed(1)} GB`,
    computeCapability && `compute capability ${computeCapability}`,
  ];
  const of = facts.filter(Boolean).join(', ');
  return `Device ${name}${of && ` (${of})`}: ${usable ? 'usable' : `not usable: ${reason}`}`;
}

function nativeAddon(): NativeAddon {
  try {
    return native();
  } catch (error) {
    throw new LoraDaError('INTERNAL', `The native add-on cannot be loaded: ${(error as Error).message}`, {
      cause: error,
    });
  }
}
