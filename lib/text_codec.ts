import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { ChatTemplate } from './chat_template';
import { readStopIds } from './checkpoint';
import { LoraDaError } from './errors';
import { readJsonObject, readOptionalJsonObject, readText } from './files';
import { type LibraryTokenizer, WordEncoder } from './word_encoder';

type Json = Record<string, unknown>;

/** What the main thread needs to know of a loaded tokenizer. */
export interface TextCodecInfo {
  bosId: number | undefined;
  eosId: number | undefined;
  padId: number | undefined;
  unkId: number | undefined;
  /** Every token that ends a generation. */
  eosIds: number[];
  /** Largest id + 1. */
  vocabSize: number;
  hasChatTemplate: boolean;
}

const specialNames = ['bos_token', 'eos_token', 'pad_token', 'unk_token', 'sep_token', 'cls_token', 'mask_token'];

/** A tokenizer with its special tokens and chat template, in the thread that uses it. */
export class TextCodec {
  private constructor(
    readonly directory: string,
    readonly info: TextCodecInfo,
    readonly template: ChatTemplate | undefined,
    private readonly library: LibraryTokenizer,
    private readonly words: WordEncoder,
    private readonly prefix: number[],
    private readonly suffix: number[],
    private readonly cleansUp: boolean,
  ) {}

  /** Reads tokenizer.json, tokenizer_config.json, the chat template and the stop tokens of a folder. */
  static async load(directory: string): Promise<TextCodec> {
    const file = join(directory, 'tokenizer.json');
    const json = await readJsonObject(file);
    const config = await readTokenizerConfig(directory);
    const special = specialTokens(config);
    addMissingTokens(json, config, special, file);
    const library = await makeLibrary(json, config, file);
    const id = (name: string) =>
      special[name] === undefined ? undefined : library.model.tokens_to_ids.get(special[name]);
    const { prefix, suffix } = surroundings(library, file);
    const [bosId, eosId] = [id('bos_token'), id('eos_token')];
    // transformers before 5 applies these two; the library never does. A post-processor may have put them there already.
    if (config.add_bos_token === true && bosId !== undefined && prefix[0] !== bosId) prefix.unshift(bosId);
    if (config.add_eos_token === true && eosId !== undefined && suffix.at(-1) !== eosId) suffix.push(eosId);
    const template = await readTemplate(directory, config, special);
    const stopIds = await readStopIds(directory);
    const info: TextCodecInfo = {
      bosId,
      eosId,
      padId: id('pad_token'),
      unkId: id('unk_token'),
      eosIds: [...new Set(eosId === undefined ? stopIds : [eosId, ...stopIds])],
      vocabSize: library.model.vocab.length,
      hasChatTemplate: template !== undefined,
    };
    const cleansUp = config.clean_up_tokenization_spaces === true && library.model.config.type !== 'BPE';
    const words = new WordEncoder(library, json);
    return new TextCodec(directory, info, template, library, words, prefix, suffix, cleansUp);
  }

  encode(text: string, addSpecialTokens: boolean): number[] {
    const ids = this.words.encode(text);
    if (!addSpecialTokens || this.prefix.length + this.suffix.length === 0) return ids;
    return [...this.prefix, ...ids, ...this.suffix];
  }

  /** Ids that the tokenizer has no token for (padding of the embedding) give nothing, as in transformers. */
  decode(ids: readonly number[], skipSpecialTokens: boolean): string {
    const known = ids.filter((id) => this.library.model.vocab[id] !== undefined);
    if (known.length === 0) return '';
    return this.library.decode(known, {
      skip_special_tokens: skipSpecialTokens,
      clean_up_tokenization_spaces: this.cleansUp,
    });
  }
}

/** tokenizer_config.json, with special_tokens_map.json over it where the former is of the older kind. */
async function readTokenizerConfig(directory: string): Promise<Json> {
  const config = (await readOptionalJsonObject(join(directory, 'tokenizer_config.json'))) ?? {};
  if (config.added_tokens_decoder !== undefined) return config;
  const map = (await readOptionalJsonObject(join(directory, 'special_tokens_map.json'))) ?? {};
  return { ...config, ...map };
}

/** Special tokens as strings; files hold strings or objects with `content`. */
function specialTokens(config: Json): Record<string, string> {
  const found: Record<string, string> = {};
  for (const name of specialNames) {
    const content = contentOf(config[name]);
    if (content !== undefined) found[name] = content;
  }
  return found;
}

function contentOf(token: unknown): string | undefined {
  if (typeof token === 'string') return token;
  const content = typeof token === 'object' && token !== null ? (token as Json).content : undefined;
  return typeof content === 'string' ? content : undefined;
}

interface AddedToken extends Json {
  id: number;
  content: string;
}

/**
 * Like transformers: tokens that tokenizer_config.json adds, and special tokens that are ordinary entries of the vocabulary,
 * are recognised as a whole in text.
 */
function addMissingTokens(json: Json, config: Json, special: Record<string, string>, file: string): void {
  if (!Array.isArray(json.added_tokens)) json.added_tokens = [];
  const added = json.added_tokens as AddedToken[];
  if (added.some((token) => typeof token?.content !== 'string' || !Number.isInteger(token.id) || token.id < 0)) {
    throw new LoraDaError('INVALID_FILE', `${file}: expected an object with id and content for each of added_tokens`);
  }
  const known = new Set(added.map(({ content }) => content));
  const add = (token: AddedToken) => {
    if (known.has(token.content)) return;
    known.add(token.content);
    added.push(token);
  };
  for (const [id, token] of Object.entries((config.added_tokens_decoder ?? {}) as Record<string, Json>)) {
    const content = contentOf(token);
    if (content !== undefined && /^\d+$/.test(id)) add({ ...token, content, id: Number(id) });
  }
  const vocabulary = (json.model as Json | undefined)?.vocab;
  if (typeof vocabulary !== 'object' || vocabulary === null || Array.isArray(vocabulary)) return;
  const extra = Array.isArray(config.additional_special_tokens) ? config.additional_special_tokens : [];
  for (const content of [...Object.values(special), ...extra.map(contentOf)]) {
    if (content === undefined || !Object.hasOwn(vocabulary, content)) continue;
    add({ id: (vocabulary as Record<string, number>)[content]!, content, special: true, normalized: false });
  }
}

async function makeLibrary(json: Json, config: Json, file: string): Promise<LibraryTokenizer> {
  const { Tokenizer } = await import('@huggingface/tokenizers');
  for (const part of ['normalizer', 'pre_tokenizer', 'post_processor', 'decoder']) json[part] ??= null;
  try {
    const library = new Tokenizer(json, config) as unknown as LibraryTokenizer;
    keepByteOrderMarks(library.decoder);
    return library;
  } catch (error) {
    throw new LoraDaError('INVALID_FILE', `${file} is not a tokenizer that can be used: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

/** Without this, a U+FEFF at the beginning of a run of byte tokens is lost: the library's byte-fallback decoder swallows it. */
function keepByteOrderMarks(decoder: LibraryTokenizer['decoder']): void {
  if (decoder?.text_decoder) decoder.text_decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  for (const part of decoder?.decoders ?? []) keepByteOrderMarks(part);
}

/** What the post-processor puts before and after a text. */
function surroundings(library: LibraryTokenizer, file: string): { prefix: number[]; suffix: number[] } {
  const text = '\u0000text';
  const tokens = library.post_processor?.([text], null, true).tokens ?? [text];
  const at = tokens.indexOf(text);
  const idOf = (token: string) => {
    const id = library.model.tokens_to_ids.get(token);
    if (id !== undefined) return id;
    throw new LoraDaError(
      'INVALID_FILE',
      `${file}: the post-processor adds ${JSON.stringify(token)}, which is not a token`,
    );
  };
  if (at < 0) throw new LoraDaError('INVALID_FILE', `${file}: the post-processor drops the text`);
  return { prefix: tokens.slice(0, at).map(idOf), suffix: tokens.slice(at + 1).map(idOf) };
}

/** chat_template.jinja, else chat_template.json, else tokenizer_config.json: one template, or named ones with a `default`. */
async function readTemplate(
  directory: string,
  config: Json,
  special: Record<string, string>,
): Promise<ChatTemplate | undefined> {
  const files = new Set(await readdir(directory));
  if (files.has('chat_template.jinja')) {
    const file = join(directory, 'chat_template.jinja');
    return ChatTemplate.compile(await readText(file), file, special);
  }
  let file = join(directory, 'tokenizer_config.json');
  let found = config.chat_template;
  if (files.has('chat_template.json')) {
    file = join(directory, 'chat_template.json');
    found = (await readJsonObject(file)).chat_template ?? found;
  }
  if (found === undefined || found === null) return undefined;
  return ChatTemplate.compile(defaultTemplate(found, file), file, special);
}

function defaultTemplate(found: unknown, file: string): string {
  if (typeof found === 'string') return found;
  if (Array.isArray(found)) {
    const named = found.find((entry) => entry?.name === 'default')?.template;
    if (typeof named === 'string') return named;
  } else if (typeof found === 'object' && typeof (found as Json).default === 'string') {
    return (found as { default: string }).default;
  }
  throw new LoraDaError(
    'INVALID_FILE',
    `${file}: expected a string, or named templates with a "default", for chat_template`,
  );
}
