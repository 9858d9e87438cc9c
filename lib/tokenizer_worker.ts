import { parentPort, type Transferable, workerData } from 'node:worker_threads';
import type { ChatMessage } from './chat_template';
import { LoraDaError } from './errors';
import { encodeRows, type RowSource } from './row_batch';
import type { RowOptions } from './rows';
import { TextCodec } from './text_codec';
import type { WorkerReply, WorkerRequest } from './worker_client';

// The thread behind Tokenizer and Dataset: tokenizer.json is parsed here and all text is encoded here, so that the main
// event loop stays free. workerData: { directory } of the model folder, undefined where rows hold ids only.

interface Answer {
  result: unknown;
  transfer?: Transferable[];
}

let codec: TextCodec | undefined;

const { directory } = workerData as { directory: string | undefined };
const ready: Promise<void> =
  directory === undefined
    ? Promise.resolve()
    : TextCodec.load(directory).then((loaded) => {
        codec = loaded;
      });
// Its failure is the answer to every call.
ready.catch(() => {});

const methods: Record<string, (parameters: never) => Answer> = {
  info: () => ({ result: loadedCodec().info }),

  encode: ({ text, addSpecialTokens }: { text: string; addSpecialTokens: boolean }) => {
    const ids = Int32Array.from(loadedCodec().encode(text, addSpecialTokens));
    return { result: ids, transfer: [ids.buffer] };
  },

  decode: ({ ids, skipSpecialTokens }: { ids: number[]; skipSpecialTokens: boolean }) => ({
    result: loadedCodec().decode(ids, skipSpecialTokens),
  }),

  template: (parameters: { messages: ChatMessage[]; addGenerationPrompt: boolean }) => {
    const { template, directory: folder } = loadedCodec();
    if (!template) throw new LoraDaError('UNSUPPORTED', `${folder} has no chat template`);
    return { result: template.render(parameters.messages, parameters.addGenerationPrompt) };
  },

  rows: ({ source, options }: { source: RowSource; options: RowOptions }) => {
    const batch = encodeRows(source, options, codec);
    const { ids, labels, lengths, labelCounts } = batch;
    return {
      result: batch,
      transfer: [ids.buffer, labels.buffer, lengths.buffer, labelCounts.buffer] as Transferable[],
    };
  },
};

function loadedCodec(): TextCodec {
  if (codec) return codec;
  throw new LoraDaError('INTERNAL', 'The worker has no tokenizer');
}

parentPort!.on('message', ({ id, method, parameters }: WorkerRequest) => {
  ready
    .then(() => methods[method]!(parameters as never))
    .then(
      ({ result, transfer }) => parentPort!.postMessage({ id, result } satisfies WorkerReply, transfer ?? []),
      (error: Error) => {
        const code = error instanceof LoraDaError ? error.code : 'INTERNAL';
        parentPort!.postMessage({ id, error: { code, message: error.message } } satisfies WorkerReply);
      },
    );
});
