#!/usr/bin/env bash
# Prepares the study's data: bash docs/study/prepare.sh DATA [en] [self-en] [zh]; DATA holds the files that docs/study/README.md lists.
set -euo pipefail
data=${1:?usage: bash docs/study/prepare.sh DATA [en] [self-en] [zh]}
shift
out=runs/study/data

prepare() { # FOLDER INPUT TOKENIZER [OPTION ...]
  local folder=$out/$1 input=$data/$2 tokenizer=$3
  shift 3
  bigmix prepare "$input" --tokenizer "$tokenizer" --output "$folder" "$@"
}

english() {
  local tokenizer=runs/study/tokenizer-en
  bigmix tokenizer train "$data/en_books.train.jsonl.gz" --vocab-size 2048 --output "$tokenizer"
  bigmix probe make "$data/en_books.train.jsonl.gz" --output runs/study/probe-en
  bigmix prepare runs/study/probe-en/text.jsonl.gz --tokenizer "$tokenizer" --output "$out/books-with-facts"
  prepare books en_books.train.jsonl.gz "$tokenizer"
  prepare books-held-out en_books.valid.jsonl.gz "$tokenizer"
  prepare other-book en_books.ood.jsonl.gz "$tokenizer"
  local name columns
  for name in gsm8k banking77 mr; do
    [ "$name" = gsm8k ] && columns=prompt=prompt,response=response || columns=prompt=text,response=label
    prepare "$name" "$name.train.jsonl" "$tokenizer" --columns "$columns"
    prepare "$name-held-out" "$name.test.jsonl" "$tokenizer" --columns "$columns"
    cp "$data/$name.test.jsonl" "$out/"
  done
}

chinese() {
  local tokenizer=runs/study/tokenizer-zh
  bigmix tokenizer train "$data/zh_law.train.jsonl.gz" --vocab-size 4096 --output "$tokenizer"
  prepare law zh_law.train.jsonl.gz "$tokenizer"
  prepare law-held-out zh_law.valid.jsonl.gz "$tokenizer"
  prepare medical huatuo_zh.train.jsonl.gz "$tokenizer"
  prepare medical-held-out huatuo_zh.test.jsonl.gz "$tokenizer"
  prepare lyrics zh_songci.train.jsonl.gz "$tokenizer" --kind text
  prepare lyrics-held-out zh_songci.valid.jsonl.gz "$tokenizer" --kind text
}

# Texts by the English base itself, once it is trained.
english_of_its_own() {
  bigmix self-replay runs/study/base-en/export --tokens 100K --max-tokens 256 --output "$out/self-en"
}

for part in "${@:-en}"; do
  case $part in
    en) english ;;
    self-en) english_of_its_own ;;
    zh) chinese ;;
    *) echo "error: $part is none of en, self-en and zh" >&2; exit 2 ;;
  esac
done
