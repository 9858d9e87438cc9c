import { checkAborted, expected } from './arguments';
import type { ChatMessage } from './chat_template';
import type { TextCodecInfo } from './text_codec';
import { WorkerClient } from './worker_client';

export type { ChatMessage } from './chat_template';

/**
 * The tokenizer and chat template of a model folder. All work is done in a worker thread; the event loop is never held up.
 *
 * @example
 * ```ts
 * const tokenizer = await Tokenizer.load('models/SmolLM2-135M-Instruct');
 * const ids = await tokenizer.encode('Hello');
 * const text = await tokenizer.applyChatTemplate([{ role: 'user', content: 'Hello' }], { addGenerationPrompt: true });
 * await tokenizer.dispose();
 * ```
 */
export class Tokenizer {
  private constructor(
    /** The folder that it was loaded from. */
    readonly directory: string,
    /** @internal The worker thread, which Dataset shares. */
    readonly client: WorkerClient,
    private readonly info: TextCodecInfo,
  ) {}

  /**
   * Loads tokenizer.json, tokenizer_config.json and the chat template (chat_template.jinja, else chat_template.json, else the
   * `chat_template` of tokenizer_config.json).
   *
   * @param directory       a model folder
   * @param options.signal  stops the work; rejects with `ABORTED`
   * @throws {LoraDaError} `FILE_NOT_FOUND`, `INVALID_FILE`, `INVALID_CONFIG`, `IO_ERROR`: names the file; `ABORTED`
   */
  static async load(directory: string, options: { signal?: AbortSignal } = {}): Promise<Tokenizer> {
    checkAborted(options.signal);
    const client = new WorkerClient('tokenizer_worker', { directory });
    try {
      const info = await client.call<TextCodecInfo>('info', {});
      checkAborted(options.signal);
      return new Tokenizer(directory, client, info);
    } catch (error) {
      client.dispose();
      throw error;
    }
  }

  /** Id of the beginning-of-sequence token; undefined where there is none. */
  get bosId(): number | undefined {
    return this.info.bosId;
  }

  /** Id of the end-of-sequence token; undefined where there is none. */
  get eosId(): number | undefined {
    return this.info.eosId;
  }

  /** Every token that ends a generation: `eosId` and those of generation_config.json, or of config.json. */
  get eosIds(): readonly number[] {
    return this.info.eosIds;
  }

  /** Id of the padding token; undefined where there is none. */
  get padId(): number | undefined {
    return this.info.padId;
  }

  /** Largest id + 1, added tokens included. The model's embedding may have more rows. */
  get vocabSize(): number {
    return this.info.vocabSize;
  }

  /** True where the folder has a chat template. */
  get hasChatTemplate(): boolean {
    return this.info.hasChatTemplate;
  }

  /**
   * @param text                      any string
   * @param options.addSpecialTokens  put the special tokens around it that the tokenizer's post-processor, `add_bos_token` and
   *   `add_eos_token` ask for (default true)
   * @throws {LoraDaError} `INVALID_ARGUMENT`, `DISPOSED`
   */
  async encode(text: string, options: { addSpecialTokens?: boolean } = {}): Promise<Int32Array> {
    if (typeof text !== 'string') throw expected('string', 'text', text);
    return this.client.call('encode', { text, addSpecialTokens: options.addSpecialTokens ?? true });
  }

  /**
   * @param ids                        token ids; those that the tokenizer does not know give nothing
   * @param options.skipSpecialTokens  leave special tokens out of the text (default true)
   * @throws {LoraDaError} `INVALID_ARGUMENT`, `DISPOSED`
   */
  async decode(ids: ArrayLike<number>, options: { skipSpecialTokens?: boolean } = {}): Promise<string> {
    const list = Array.from(ids);
    const wrong = list.find((id) => !Number.isInteger(id) || id < 0);
    if (wrong !== undefined) throw expected('integers of 0 or more', 'ids', wrong);
    return this.client.call('decode', { ids: list, skipSpecialTokens: options.skipSpecialTokens ?? true });
  }

  /**
   * Renders a conversation as text. Encode it with `addSpecialTokens: false`: the template brings its own.
   *
   * @param messages                     the turns, oldest first
   * @param options.addGenerationPrompt  open the assistant's turn at the end (default false)
   * @throws {LoraDaError} `UNSUPPORTED` without a template, `INVALID_DATA` where the template refuses the messages,
   *   `INVALID_ARGUMENT`, `DISPOSED`
   */
  async applyChatTemplate(
    messages: readonly ChatMessage[],
    options: { addGenerationPrompt?: boolean } = {},
  ): Promise<string> {
    if (!Array.isArray(messages)) throw expected('array of messages', 'messages', messages);
    const wrong = messages.find((message) => typeof message?.role !== 'string');
    if (wrong !== undefined) throw expected('message with a role', 'messages', wrong);
    return this.client.call('template', { messages, addGenerationPrompt: options.addGenerationPrompt ?? false });
  }

  /** Ends the worker thread; later calls reject with `DISPOSED`. */
  async dispose(): Promise<void> {
    this.client.dispose();
  }

  [Symbol.dispose](): void {
    this.client.dispose();
  }
}
