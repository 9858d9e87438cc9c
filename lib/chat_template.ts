import { LoraDaError } from './errors';

/** One turn of a conversation. Templates may read further fields. */
export interface ChatMessage {
  role: string;
  content: unknown;
  [field: string]: unknown;
}

/** A compiled chat template with the special tokens that it may name. Runs in the tokenizer's thread. */
export class ChatTemplate {
  private constructor(
    private readonly template: { render(values: Record<string, unknown>): string },
    readonly file: string,
    private readonly specialTokens: Record<string, string>,
  ) {}

  /**
   * @param source         the Jinja text
   * @param file           where it is from, for messages
   * @param specialTokens  `bos_token`, `eos_token` … as strings
   * @throws {LoraDaError} `INVALID_FILE` where the text is not a template
   */
  static async compile(source: string, file: string, specialTokens: Record<string, string>): Promise<ChatTemplate> {
    const { Template } = await import('@huggingface/jinja');
    try {
      return new ChatTemplate(new Template(source), file, specialTokens);
    } catch (error) {
      throw new LoraDaError('INVALID_FILE', `${file}: the chat template is malformed: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  /** @throws {LoraDaError} `INVALID_DATA` where the template refuses the messages */
  render(messages: readonly ChatMessage[], addGenerationPrompt: boolean, tools: unknown = null): string {
    try {
      return this.template.render({
        ...this.specialTokens,
        messages: messages as unknown[],
        tools,
        documents: null,
        add_generation_prompt: addGenerationPrompt,
      });
    } catch (error) {
      const reason = (error as Error).message.split('\n')[0]!.slice(0, 200);
      throw new LoraDaError('INVALID_DATA', `the chat template of ${this.file} refuses the messages: ${reason}`, {
        cause: error,
      });
    }
  }
}
