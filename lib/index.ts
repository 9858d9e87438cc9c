/**
 * LoRA fine-tuning of language models from Node.js, started from data (LoRA-DA).
 *
 * @packageDocumentation
 */
export {
  CausalLM,
  type EvaluateOptions,
  type Evaluation,
  type GenerateOptions,
  type Generation,
  type LoadOptions,
  type LoraOptions,
} from './causal_lm';
export { resolveTrainConfig, type TrainConfig } from './config';
export { Dataset } from './dataset';
export { type ErrorCode, LoraDaError } from './errors';
export type { InitializationOptions, InitializationReport, ModuleReport } from './initializations';
export type { LongCallOptions, LoraAdapter } from './lora_adapter';
export { type EstimateOptions, estimateRun, type RunEstimate } from './memory';
export type { MergeOptions } from './merge';
export type { EvaluationMetrics, StepMetrics } from './metrics';
export type {
  CollectionOrder,
  CollectionPlan,
  DecoderSpec,
  Dtype,
  InitializationPhase,
  NativeModelInfo,
} from './native';
export { writeReport } from './report';
export { learningRateAt, type Schedule } from './schedule';
export { Tokenizer } from './tokenizer';
export {
  type EvaluationEvent,
  type StepEvent,
  Trainer,
  type TrainerEvents,
  type TrainerOptions,
  type TrainResult,
} from './trainer';
