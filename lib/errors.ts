/**
 * Stable codes of every error that this package throws on purpose, as `error.code`.
 *
 * | code | meaning |
 * | --- | --- |
 * | `INVALID_ARGUMENT` | an option or argument is out of range or of the wrong type |
 * | `INVALID_CONFIG` | a configuration file (config.json, adapter_config.json, --config) is malformed or inconsistent |
 * | `UNSUPPORTED` | a valid file asks for something that lora-da does not do; the message names it |
 * | `INVALID_TENSOR` | a tensor is missing, extra, misshapen or of the wrong type |
 * | `INVALID_FILE` | a file is not what its name says: malformed JSON, safetensors, tokenizer |
 * | `FILE_NOT_FOUND` | a file or folder does not exist |
 * | `FILE_TRUNCATED` | a file is shorter than its header says, or was cut while in use |
 * | `IO_ERROR` | the system refused to read or write: disk full, read-only, no permission |
 * | `INVALID_DATA` | a row of a data set is malformed; the message names file, row and field |
 * | `NO_LABELS` | no row has a label token left |
 * | `OUT_OF_MEMORY` | the device or the system has not enough memory |
 * | `NOT_POSITIVE_DEFINITE` | an input second moment could not be factorized; the message names the module |
 * | `NON_FINITE` | a loss or gradient became NaN or infinite; the message names the step |
 * | `RESUME_MISMATCH` | a checkpoint does not belong to this base, data or configuration; the message names the field |
 * | `ABORTED` | stopped by an AbortSignal or SIGINT |
 * | `DEVICE_UNAVAILABLE` | the device asked for cannot be had; the message says why |
 * | `DISPOSED` | the object was used after dispose() |
 * | `INTERNAL` | a defect of lora-da itself |
 */
export type ErrorCode =
  | 'INVALID_ARGUMENT'
  | 'INVALID_CONFIG'
  | 'UNSUPPORTED'
  | 'INVALID_TENSOR'
  | 'INVALID_FILE'
  | 'FILE_NOT_FOUND'
  | 'FILE_TRUNCATED'
  | 'IO_ERROR'
  | 'INVALID_DATA'
  | 'NO_LABELS'
  | 'OUT_OF_MEMORY'
  | 'NOT_POSITIVE_DEFINITE'
  | 'NON_FINITE'
  | 'RESUME_MISMATCH'
  | 'ABORTED'
  | 'DEVICE_UNAVAILABLE'
  | 'DISPOSED'
  | 'INTERNAL';

/** The error class of this package: one clear sentence and a stable `code`. */
export class LoraDaError extends Error {
  override readonly name = 'LoraDaError';

  constructor(
    readonly code: ErrorCode,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}
