import { LoraDaError } from '../errors';
import { type NativeInfo, native } from '../native';
import type { CommandContext } from './context';

/** `lora-da info` */
export async function info(_given: Record<string, unknown>, { print }: CommandContext): Promise<object> {
  const version = (require('../../package.json') as { version: string }).version;
  const found = nativeInfo();
  print(`lora-da ${version}, Node ${process.versions.node}`);
  print(
    `CPU: ${found.isa}, ${found.threads} threads, ${found.bfloat16 ? 'multiplies bfloat16' : 'no bfloat16 products'}`,
  );
  for (const { name, usable, reason } of found.devices) {
    print(`Device ${name}: ${usable ? 'usable' : 'not usable'}${reason ? ` (${reason})` : ''}`);
  }
  for (const [name, text] of Object.entries(found.libraries)) print(`Library ${name}: ${text}`);
  print(`Initializations: ${found.initializations.map(({ name }) => name).join(', ')}`);
  return { version, node: process.versions.node, core: found };
}

function nativeInfo(): NativeInfo {
  try {
    return native().info();
  } catch (error) {
    throw new LoraDaError('INTERNAL', `The native add-on cannot be loaded: ${(error as Error).message}`, {
      cause: error,
    });
  }
}
