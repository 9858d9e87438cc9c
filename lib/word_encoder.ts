/**
 * The fast way through @huggingface/tokenizers: text is cut where no token can cross, and the ids of each piece are
 * remembered. Natural text repeats its words, so most pieces cost one look-up. Where a tokenizer's parts are not known
 * to permit such cuts, the library encodes the text as a whole.
 */

/** The parts of the library's Tokenizer (0.2) that are used here; its type declarations call some of them private. */
export interface LibraryTokenizer {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
  decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  normalizer: ((text: string) => string) | null;
  pre_tokenizer: ((text: string, options?: { section_index: number }) => string[]) | null;
  post_processor: ((tokens: string[], pair: null, addSpecial: boolean) => { tokens: string[] }) | null;
  decoder: LibraryDecoder | null;
  model: ((tokens: string[]) => string[]) & {
    config: Record<string, unknown>;
    vocab: (string | undefined)[];
    tokens_to_ids: Map<string, number>;
    unk_token_id: number | undefined;
  };
  added_tokens: { content: string; id: number; special: boolean }[];
  added_tokens_map: Map<string, { id: number; lstrip: boolean; rstrip: boolean }>;
  splitter_unnormalized: { split(text: string): string[] };
  splitter_normalized: { split(text: string): string[]; trie: object };
  remove_space: boolean | undefined;
  do_lowercase_and_remove_accent: boolean;
}

interface LibraryDecoder {
  text_decoder?: InstanceType<typeof TextDecoder>;
  decoders?: LibraryDecoder[];
}

/** How many pieces are remembered before the memory is emptied, and the longest one that is. */
const rememberedPieces = 1 << 17;
const longestPiece = 64;

/** Splitting patterns in which no match crosses from a character that is not white space to a space. */
const knownPatterns = new Set([
  // Llama 3, cl100k
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
  // Qwen 2, 3
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
]);

type Cutter = 'spaces' | 'metaspaces' | 'none';

/** Encodes text without special tokens, as the library does. */
export class WordEncoder {
  private readonly pieces = new Map<string, number[]>();
  /** Where text is cut. */
  readonly cutter: Cutter;
  private readonly addedFirst: RegExp | undefined;
  private readonly hasNormalizedAdded: boolean;

  /** @param json  the tokenizer.json that `library` was made from */
  constructor(
    private readonly library: LibraryTokenizer,
    json: Record<string, unknown>,
  ) {
    this.cutter = chooseCutter(library, json);
    this.addedFirst = firstCharacters(library.added_tokens.map(({ content }) => content));
    this.hasNormalizedAdded = Object.keys(library.splitter_normalized.trie).length > 0;
  }

  encode(text: string): number[] {
    if (this.cutter === 'none') return this.library.encode(text, { add_special_tokens: false }).ids;
    const out: number[] = [];
    this.splitAtAdded(text, this.addedFirst, this.library.splitter_unnormalized, out, (section, i) => {
      const normalized = this.library.normalizer ? this.library.normalizer(section) : section;
      if (!this.hasNormalizedAdded) this.encodeSection(normalized, i, out);
      else {
        this.splitAtAdded(normalized, undefined, this.library.splitter_normalized, out, (part) =>
          this.encodeSection(part, i, out),
        );
      }
    });
    return out;
  }

  /** Ids of added tokens go to `out`; the text between them to `rest`, trimmed where a token asks for it. */
  private splitAtAdded(
    text: string,
    first: RegExp | undefined,
    splitter: { split(text: string): string[] },
    out: number[],
    rest: (section: string, index: number) => void,
  ): void {
    if (text.length === 0) return;
    if (first && !first.test(text)) {
      rest(text, 0);
      return;
    }
    const added = this.library.added_tokens_map;
    const sections = splitter.split(text);
    for (let i = 0; i < sections.length; i++) {
      const token = added.get(sections[i]!);
      if (token?.lstrip && i > 0) sections[i - 1] = sections[i - 1]!.trimEnd();
      if (token?.rstrip && i < sections.length - 1) sections[i + 1] = sections[i + 1]!.trimStart();
    }
    for (let i = 0; i < sections.length; i++) {
      const section = sections[i]!;
      const token = added.get(section);
      if (token) out.push(token.id);
      else if (section.length > 0) rest(section, i);
    }
  }

  private encodeSection(text: string, sectionIndex: number, out: number[]): void {
    if (text.length === 0) return;
    if (this.cutter === 'spaces') this.encodeCutAtSpaces(text, sectionIndex, out);
    else {
      const words = this.library.pre_tokenizer?.(text, { section_index: sectionIndex }) ?? [text];
      for (const word of words) this.encodeCutAtMetaspaces(word, out);
    }
  }

  /** A piece begins at each space that stands between two characters that are not white space. */
  private encodeCutAtSpaces(text: string, sectionIndex: number, out: number[]): void {
    let begin = 0;
    for (let at = text.indexOf(' ', 1); at !== -1; at = text.indexOf(' ', at + 1)) {
      if (isSpace(text.charCodeAt(at - 1)) || at + 1 >= text.length || isSpace(text.charCodeAt(at + 1))) continue;
      this.encodePiece(text.slice(begin, at), sectionIndex, out);
      begin = at;
    }
    this.encodePiece(begin === 0 ? text : text.slice(begin), sectionIndex, out);
  }

  private encodePiece(piece: string, sectionIndex: number, out: number[]): void {
    let ids = this.pieces.get(piece);
    if (!ids) {
      const words = this.library.pre_tokenizer!(piece, { section_index: sectionIndex });
      ids = this.remember(piece, this.idsOf(this.library.model(words)));
    }
    for (const id of ids) out.push(id);
  }

  /** A piece begins at each ▁ that follows another character. */
  private encodeCutAtMetaspaces(word: string, out: number[]): void {
    let begin = 0;
    for (let at = word.indexOf('▁', 1); at !== -1; at = word.indexOf('▁', at + 1)) {
      if (word[at - 1] === '▁') continue;
      this.encodeWord(word.slice(begin, at), out);
      begin = at;
    }
    this.encodeWord(begin === 0 ? word : word.slice(begin), out);
  }

  private encodeWord(word: string, out: number[]): void {
    const ids = this.pieces.get(word) ?? this.remember(word, this.idsOf(this.library.model([word])));
    for (const id of ids) out.push(id);
  }

  private idsOf(tokens: string[]): number[] {
    const { tokens_to_ids: ids, unk_token_id: unknown } = this.library.model;
    return tokens.map((token) => ids.get(token) ?? unknown!);
  }

  private remember(piece: string, ids: number[]): number[] {
    if (piece.length > longestPiece) return ids;
    if (this.pieces.size >= rememberedPieces) this.pieces.clear();
    // A slice of 13 characters or more would keep the whole text that it was cut from alive.
    this.pieces.set(piece.length < 13 ? piece : Buffer.from(piece, 'utf16le').toString('utf16le'), ids);
    return ids;
  }
}

function chooseCutter(library: LibraryTokenizer, json: Record<string, unknown>): Cutter {
  const { config } = library.model;
  if (library.remove_space || library.do_lowercase_and_remove_accent) return 'none';
  if (config.type !== 'BPE' && config.type !== undefined) return 'none';
  if (!Array.isArray(config.merges) || config.end_of_word_suffix || config.continuing_subword_suffix) return 'none';
  if (cutsAtSpaces(json.pre_tokenizer)) return 'spaces';
  return cutsAtMetaspaces(library) ? 'metaspaces' : 'none';
}

interface PreTokenizerJson {
  type?: string;
  pretokenizers?: PreTokenizerJson[];
  pattern?: { Regex?: string };
  behavior?: string;
  invert?: boolean;
  use_regex?: boolean;
}

function cutsAtSpaces(json: unknown): boolean {
  if (typeof json !== 'object' || json === null) return false;
  const top = json as PreTokenizerJson;
  const parts = top.type === 'Sequence' ? (top.pretokenizers ?? []) : [top];
  const splits = (part: PreTokenizerJson) => part.type === 'Split' && knownPatterns.has(part.pattern?.Regex ?? '');
  const isKnown = (part: PreTokenizerJson) =>
    part.type === 'Digits' ||
    part.type === 'ByteLevel' ||
    (splits(part) && !part.invert && part.behavior === 'Isolated');
  const isCut = (part: PreTokenizerJson) => splits(part) || (part.type === 'ByteLevel' && part.use_regex !== false);
  return parts.length > 0 && parts.every(isKnown) && parts.some(isCut);
}

/** True where no token holds a ▁ after another character, so that no merge crosses such a border. */
function cutsAtMetaspaces({ model }: LibraryTokenizer): boolean {
  let found = false;
  for (const token of Object.keys(model.config.vocab ?? {}) as string[]) {
    if (token.includes('▁')) found = true;
    if (/[^▁]▁/.test(token)) return false;
  }
  // Runs of unknown tokens are fused across a border; with all 256 byte tokens there are none.
  const hasBytes =
    model.config.byte_fallback === true && model.tokens_to_ids.has('<0x00>') && model.tokens_to_ids.has('<0xFF>');
  return found && (hasBytes || !model.config.fuse_unk);
}

/** Matches text that may hold one of the tokens. */
function firstCharacters(tokens: string[]): RegExp {
  const escaped = (token: string) => token.charAt(0).replace(/[\\\]^-]/g, '\\$&');
  const characters = [...new Set(tokens.filter((token) => token.length > 0).map(escaped))];
  return characters.length === 0 ? /(?!)/ : new RegExp(`[${characters.join('')}]`);
}

const spaces = new Uint8Array(65536);
for (let code = 0; code < 65536; code++) {
  const character = String.fromCharCode(code);
  if (/[\s\p{White_Space}]/u.test(character)) spaces[code] = 1;
}

function isSpace(code: number): boolean {
  return spaces[code] === 1;
}
