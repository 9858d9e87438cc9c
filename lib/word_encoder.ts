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

/**
 * Splitting patterns in which no match crosses from a character that is not white space to a space, and none joins digits with
 * other characters. The second holds one digit at most.
 */
const knownPatterns = [
  // Llama 3, cl100k
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
  // Qwen 2, 3
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
] as const;
const [, oneDigitPattern] = knownPatterns;

type Cutter = 'spaces' | 'metaspaces' | 'none';

/** Encodes text without special tokens, as the library does. */
export class WordEncoder {
  private readonly pieces = new Map<string, number[]>();
  /** The ids of each word that the pre-tokenizer makes of a piece: unusual pieces (`(3*12)=36`) are made of usual words. */
  private readonly words = new Map<string, number[]>();
  /** Where text is cut. */
  readonly cutter: Cutter;
  /** Each digit is a word of its own. */
  private readonly splitsDigits: boolean;
  private readonly addedBeginning: RegExp | undefined;
  private readonly hasNormalizedAdded: boolean;

  /** @param json  the tokenizer.json that `library` was made from */
  constructor(
    private readonly library: LibraryTokenizer,
    json: Record<string, unknown>,
  ) {
    this.cutter = chooseCutter(library, json);
    this.splitsDigits = preTokenizers(json.pre_tokenizer).some(splitsDigits);
    this.addedBeginning = beginnings(library.added_tokens.map(({ content }) => content));
    this.hasNormalizedAdded = Object.keys(library.splitter_normalized.trie).length > 0;
  }

  encode(text: string): number[] {
    if (this.cutter === 'none') return this.library.encode(text, { add_special_tokens: false }).ids;
    const out: number[] = [];
    this.splitAtAdded(text, this.addedBeginning, this.library.splitter_unnormalized, out, (section, i) => {
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
    beginning: RegExp | undefined,
    splitter: { split(text: string): string[] },
    out: number[],
    rest: (section: string, index: number) => void,
  ): void {
    if (text.length === 0) return;
    if (beginning && !beginning.test(text)) {
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

  private encodeCutAtSpaces(text: string, sectionIndex: number, out: number[]): void {
    let begin = 0;
    for (let at = 1; at < text.length; at++) {
      if (!this.isBorder(text, at)) continue;
      this.encodePiece(text.slice(begin, at), sectionIndex, out);
      begin = at;
    }
    this.encodePiece(begin === 0 ? text : text.slice(begin), sectionIndex, out);
  }

  /**
   * A piece begins at a space that stands between two characters that are not white space, and, within ASCII, where digits meet
   * letters or marks and where a mark follows a letter.
   */
  private isBorder(text: string, at: number): boolean {
    const kind = kinds[text.charCodeAt(at)]!;
    const before = kinds[text.charCodeAt(at - 1)]!;
    if (before === Kind.space) return false;
    if (kind === Kind.space) {
      return text.charCodeAt(at) === 0x20 && at + 1 < text.length && kinds[text.charCodeAt(at + 1)] !== Kind.space;
    }
    if (kind === Kind.digit) return before === Kind.digit ? this.splitsDigits : before !== Kind.other;
    if (before === Kind.digit) return kind !== Kind.other;
    return before === Kind.letter && kind === Kind.mark;
  }

  private encodePiece(piece: string, sectionIndex: number, out: number[]): void {
    let ids = this.pieces.get(piece);
    if (!ids) {
      ids = [];
      for (const word of this.library.pre_tokenizer!(piece, { section_index: sectionIndex }))
        this.encodeWord(word, ids);
      remember(this.pieces, piece, ids);
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
    let ids = this.words.get(word);
    if (!ids) {
      ids = this.idsOf(this.library.model([word]));
      remember(this.words, word, ids);
    }
    for (const id of ids) out.push(id);
  }

  private idsOf(tokens: string[]): number[] {
    const { tokens_to_ids: ids, unk_token_id: unknown } = this.library.model;
    return tokens.map((token) => ids.get(token) ?? unknown!);
  }
}

function remember(memory: Map<string, number[]>, text: string, ids: number[]): void {
  if (text.length > longestPiece) return;
  if (memory.size >= rememberedPieces) memory.clear();
  // A slice of 13 characters or more would keep the whole text that it was cut from alive.
  memory.set(text.length < 13 ? text : Buffer.from(text, 'utf16le').toString('utf16le'), ids);
}

function chooseCutter(library: LibraryTokenizer, json: Record<string, unknown>): Cutter {
  const { config } = library.model;
  if (library.remove_space || library.do_lowercase_and_remove_accent) return 'none';
  if (config.type !== 'BPE' && config.type !== undefined) return 'none';
  if (!Array.isArray(config.merges) || config.end_of_word_suffix || config.continuing_subword_suffix) return 'none';
  // Unknown words that stand side by side would be fused into one.
  if (!config.fuse_unk && cutsAtSpaces(json.pre_tokenizer)) return 'spaces';
  return cutsAtMetaspaces(library) ? 'metaspaces' : 'none';
}

interface PreTokenizerJson {
  type?: string;
  pretokenizers?: PreTokenizerJson[];
  pattern?: { Regex?: string };
  behavior?: string;
  invert?: boolean;
  use_regex?: boolean;
  individual_digits?: boolean;
}

function cutsAtSpaces(json: unknown): boolean {
  const parts = preTokenizers(json);
  const isKnown = (part: PreTokenizerJson) =>
    part.type === 'Digits' || part.type === 'ByteLevel' || knownPattern(part) !== undefined;
  const isCut = (part: PreTokenizerJson) =>
    knownPattern(part) !== undefined || (part.type === 'ByteLevel' && part.use_regex !== false);
  return parts.length > 0 && parts.every(isKnown) && parts.some(isCut);
}

function preTokenizers(json: unknown): PreTokenizerJson[] {
  if (typeof json !== 'object' || json === null) return [];
  const top = json as PreTokenizerJson;
  return top.type === 'Sequence' ? (top.pretokenizers ?? []) : [top];
}

function knownPattern({ type, pattern, invert, behavior }: PreTokenizerJson): string | undefined {
  if (type !== 'Split' || invert || behavior !== 'Isolated') return undefined;
  return knownPatterns.find((known) => known === pattern?.Regex);
}

function splitsDigits(part: PreTokenizerJson): boolean {
  return (part.type === 'Digits' && part.individual_digits === true) || knownPattern(part) === oneDigitPattern;
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

/** Matches text that may hold one of the tokens: it holds the beginning of one. */
function beginnings(tokens: string[]): RegExp {
  const parts = new Set(tokens.filter((token) => token.length > 0).map((token) => token.slice(0, 3)));
  if (parts.size === 0) return /(?!)/;
  return new RegExp([...parts].map((part) => part.replace(/[$()*+./?[\\\]^{|}-]/g, '\\$&')).join('|'));
}

enum Kind {
  other,
  space,
  /** Of ASCII, as the following. */
  digit,
  letter,
  mark,
}

const kinds = new Uint8Array(65536);
for (let code = 0; code < 65536; code++) {
  const character = String.fromCharCode(code);
  if (/[\s\p{White_Space}]/u.test(character)) kinds[code] = Kind.space;
  else if (code >= 128) continue;
  else if (/[0-9]/.test(character)) kinds[code] = Kind.digit;
  else if (/[A-Za-z]/.test(character)) kinds[code] = Kind.letter;
  else kinds[code] = Kind.mark;
}
