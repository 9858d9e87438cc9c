/**
 * The CUDA device as the product sees it. Where there is no GPU: the shared object that nvcc made opens, and what is missing is said.
 * On the simulated device (native/test/cuda_sim), which takes its place: choice, messages, and the commands' results.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { before, test } from 'node:test';
import type { NativeDevice } from '../lib/native';
import { type CliResult, jsonOf, runCli } from './run_cli';
import { temporaryFolder, writeTinyData, writeTinyModel } from './tiny_folder';

const built = join(__dirname, '../build/Release');
const simulator = join(built, 'liblora_da_cuda_sim.so');
const hasDriver = existsSync('/proc/driver/nvidia/version') || existsSync('/dev/dxg');
const hasCudaBuild = [12, 13].some((major) => existsSync(join(built, `liblora_da_cuda${major}.so`)));
const withoutDriver = { skip: hasDriver && 'this machine has an NVIDIA driver' };
const simulated = {
  skip: !existsSync(simulator) && 'the simulated device was not built: it needs the headers of CUDA',
};

const folder = temporaryFolder();
const model = join(folder, 'model');
const data = join(folder, 'train.jsonl');

before(async () => {
  await writeTinyModel(model);
  writeTinyData(data, 12);
});

const run = (args: string[], env: Record<string, string> = {}) =>
  runCli(args, { fake: false, env: { LORA_DA_CUDA_LIBRARY: '', ...env } });
const onSimulator = (args: string[], env: Record<string, string> = {}) =>
  run(args, { LORA_DA_CUDA_LIBRARY: simulator, ...env });
const evalOn = (device: string) => ['eval', '--model', model, '--data', data, '--device', device, '--dtype', 'float32'];

function devicesOf(result: CliResult): NativeDevice[] {
  assert.equal(result.code, 0, result.stderr);
  return (jsonOf(result).core as { devices: NativeDevice[] }).devices;
}

function assertFails({ code, stderr }: CliResult, message: RegExp): void {
  assert.equal(code, 1, stderr);
  assert.match(stderr, message);
  assert.equal(
    stderr.trimEnd().split('\n').at(-1),
    stderr
      .trimEnd()
      .split('\n')
      .find((line) => message.test(line)),
  );
}

const noDriver = hasCudaBuild
  ? /there is no NVIDIA driver \(libcuda\.so\.1\): install driver 5\d\d or later/
  : /this installation has no CUDA device: there is no liblora_da_cuda13\.so or liblora_da_cuda12\.so in .*, and no NVIDIA driver/;

test('without a driver, info says why CUDA cannot be used', withoutDriver, async () => {
  const devices = devicesOf(await run(['info', '--json']));
  assert.deepEqual(
    devices.map(({ name, usable }) => [name, usable]),
    [
      ['cpu', true],
      ['cuda', false],
    ],
  );
  assert.match(devices[1]!.reason, noDriver);
});

test('without a driver, --device cuda fails with that reason in one line', withoutDriver, async () => {
  const { code, stderr } = await run(evalOn('cuda'));
  assert.equal(code, 1);
  assert.match(stderr, new RegExp(`^lora-da: device cuda is not available: ${noDriver.source}[^\\n]*\\n$`));
});

test('without a driver, --device auto is the CPU and says nothing of CUDA', withoutDriver, async () => {
  const { code, stderr } = await run(evalOn('auto'));
  assert.equal(code, 0, stderr);
  assert.doesNotMatch(stderr, /cuda/i);
});

for (const [major, driver] of [
  [12, 525],
  [13, 580],
] as const) {
  const library = join(process.env.LORA_DA_TEST_CUDA_BUILDS ?? built, `liblora_da_cuda${major}.so`);
  const skip = !existsSync(library) && `no toolkit of CUDA ${major} was found by the build`;
  test(`the shared object of CUDA ${major} opens with that version's libraries`, { skip }, async () => {
    const result = await run(['info', '--json'], { LORA_DA_CUDA_LIBRARY: library });
    const [, device] = devicesOf(result);
    const { libraries } = jsonOf(result).core as { libraries: Record<string, string> };
    assert.match(libraries['CUDA runtime'] ?? device!.reason, new RegExp(`^${major}\\.`));
    assert.match(libraries.cuBLAS!, new RegExp(`^${major}\\.`));
    assert.match(libraries.cuSOLVER!, new RegExp(`^${major - 1}\\.`));
    if (!hasDriver) assert.match(device!.reason, new RegExp(`install driver ${driver} or later`));
  });
}

test('a library that is not there is named', async () => {
  const env = { LORA_DA_CUDA_LIBRARY: '/nowhere/device.so' };
  assertFails(await run(evalOn('cuda'), env), /cannot open \/nowhere\/device\.so.*LORA_DA_CUDA_LIBRARY names it/);
  const fallback = await run(evalOn('auto'), env);
  assert.equal(fallback.code, 0, fallback.stderr);
  assert.match(fallback.stderr, /Running on cpu: device cuda is not available: cannot open \/nowhere\/device\.so/);
});

test('a library that is something else is refused', async () => {
  assertFails(
    await run(evalOn('cuda'), { LORA_DA_CUDA_LIBRARY: 'libm.so.6' }),
    /libm\.so\.6 is not a CUDA device of lora-da/,
  );
});

test('info lists the devices with memory, compute capability and libraries', simulated, async () => {
  const result = await onSimulator(['info', '--json'], { CUDA_SIM_DEVICES: '2', CUDA_SIM_MEMORY: '1000000' });
  const [, first, second] = devicesOf(result);
  assert.deepEqual(first, {
    name: 'cuda:0',
    model: 'CUDA simulator',
    usable: true,
    reason: '',
    memory: 1000000,
    computeCapability: '9.0',
    bfloat16: true,
  });
  assert.equal(second!.name, 'cuda:1');
  const { libraries } = jsonOf(result).core as { libraries: Record<string, string> };
  for (const name of ['CUDA driver', 'CUDA runtime', 'cuBLAS', 'cuSOLVER'])
    assert.match(libraries[name]!, /\d+\.\d+/, name);
});

for (const [what, error, reason] of [
  ['no GPU', 100, /the NVIDIA driver finds no GPU/],
  ['too old a driver', 35, /the NVIDIA driver is too old/],
  ['a driver that does not start', 999, /CUDA does not start: .*cudaErrorUnknown/],
] as const) {
  test(`${what} is said`, simulated, async () => {
    assertFails(await onSimulator(evalOn('cuda'), { CUDA_SIM_DRIVER_ERROR: String(error) }), reason);
  });
}

test('a device that the machine does not have is refused with those that it has', simulated, async () => {
  assertFails(
    await onSimulator(evalOn('cuda:2'), { CUDA_SIM_DEVICES: '2' }),
    /device cuda:2 is not available: the machine has cuda:0 CUDA simulator, cuda:1 CUDA simulator/,
  );
});

test(
  'too little device memory is an error with what was asked for, what is free and what helps',
  simulated,
  async () => {
    assertFails(
      await onSimulator(evalOn('cuda'), { CUDA_SIM_MEMORY: '33600000' }),
      /cannot allocate \d.* on cuda:0 CUDA simulator for .*: \d.* are free; a smaller --batch-size/,
    );
  },
);

test('auto is the GPU, and its evaluation is that of the CPU', simulated, async () => {
  const onGpu = await onSimulator([...evalOn('auto'), '--json']);
  const onCpu = await run([...evalOn('cpu'), '--json']);
  assert.equal(onGpu.code, 0, onGpu.stderr);
  const [gpu, cpu] = [onGpu, onCpu].map((result) => jsonOf(result).loss as number) as [number, number];
  assert.ok(Math.abs(gpu / cpu - 1) < 1e-5, `${gpu} on the GPU, ${cpu} on the CPU`);
});

test('a run on the GPU: dry run, LoRA-DA start, training, resume on the CPU with a warning', simulated, async () => {
  const out = join(folder, 'run');
  const args = ['train', '--model', model, '--data', data, '--out', out, '--rank', '2', '--batch-size', '4'];
  const options = [...args, '--samples', '8', '--dtype', 'float32', '--json'];
  const dry = await onSimulator([...options, '--max-steps', '2', '--dry-run', '--device', 'cuda']);
  assert.equal(dry.code, 0, dry.stderr);
  const { memory } = jsonOf(dry) as { memory: { free: number } };
  assert.ok(memory.free > 0 && memory.free < 2 ** 33, `${memory.free} bytes free on a device of 8 GiB`);

  const trained = await onSimulator([...options, '--max-steps', '2', '--device', 'cuda:0']);
  assert.equal(trained.code, 0, trained.stderr);
  const config = JSON.parse(readFileSync(join(out, 'config.json'), 'utf8')) as { device: string };
  assert.equal(config.device, 'cuda:0');

  const onCpu = join(folder, 'cpu-run');
  const cpu = await run(
    options.map((option) => (option === out ? onCpu : option)).concat('--max-steps', '2', '--device', 'cpu'),
  );
  assert.equal(cpu.code, 0, cpu.stderr);
  const lossOf = (path: string) =>
    readFileSync(join(path, 'metrics.jsonl'), 'utf8')
      .trimEnd()
      .split('\n')
      .map((line) => (JSON.parse(line) as { loss: number }).loss);
  for (const [step, loss] of lossOf(onCpu).entries()) {
    assert.ok(Math.abs(lossOf(out)[step]! / loss - 1) < 1e-4, `step ${step + 1}: ${lossOf(out)[step]} and ${loss}`);
  }

  const resumed = await run([...options, '--max-steps', '2', '--resume', '--device', 'cpu']);
  assert.equal(resumed.code, 0, resumed.stderr);
  assert.match(resumed.stderr, /Warning: device was "CUDA simulator" and is "cpu" now/);
  assert.doesNotMatch(resumed.stderr, /threads was/);
});
