/** The device that tests of the native model run on: LORA_DA_TEST_DEVICE, as --device takes it. */
export const testDevice = process.env.LORA_DA_TEST_DEVICE ?? 'cpu';
