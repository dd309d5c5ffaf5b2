//! The compiled vocabulary: token bytes, a table of strings and a table of merges, read in place.
//!
//! Layout, all little-endian, nothing aligned (a plan may put it anywhere):
//!
//! | bytes | content |
//! |---|---|
//! | 8 | magic, the last byte is the format |
//! | 5 x u64 | the byte lengths of the sections that follow, which fill the blob exactly |
//! | config | JSON, [`crate::config::Config`] |
//! | offsets | u32 x (vocab + 1): token i is `slab[offsets[i]..offsets[i + 1]]`; empty means there is no such token |
//! | slab | bytes of all tokens |
//! | strings | u32 x 2^n: open addressing by the hash of a token's bytes; id + 1, or 0 for a free slot |
//! | merges | (left, right, rank, product) u32 x 2^m: open addressing by the pair; left = u32::MAX is a free slot |

use std::ops::Range;

use bytes::Bytes;

use crate::error::TextError;

const MAGIC: [u8; 8] = *b"tstok\0\0\x01";
const SECTIONS: usize = 5;
const HEADER: usize = MAGIC.len() + SECTIONS * 8;
const FREE: u32 = u32::MAX;
const SLOT: usize = 16;

/// A merge: what a pair of neighbouring tokens becomes, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    /// Lowest goes first.
    pub rank: u32,
    pub product: u32,
}

/// The tables of one tokenizer, borrowed from the bytes of the blob.
pub(crate) struct Tables {
    blob: Bytes,
    offsets: Range<usize>,
    slab: Range<usize>,
    strings: Range<usize>,
    merges: Range<usize>,
}

fn corrupt(what: impl Into<String>) -> TextError {
    TextError::Corrupt(what.into())
}

fn u32_at(bytes: &[u8], index: usize) -> u32 {
    let at = index * 4;
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn hash_bytes(bytes: &[u8]) -> u64 {
    // FNV-1a with a final mix: tokens are short, and only tokens of the vocabulary are ever stored.
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (fnv ^ (fnv >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn hash_pair(left: u32, right: u32) -> u64 {
    let pair = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (pair ^ (pair >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The first slot of `hash` in a table of 2^n slots.
fn home(hash: u64, slots: usize) -> usize {
    (hash >> 32) as usize & (slots - 1)
}

/// Slots for `entries`: a power of two, at most two thirds full, never without a free slot.
fn slots_for(entries: usize) -> usize {
    (entries + entries / 2 + 1).next_power_of_two()
}

impl Tables {
    /// Takes a blob apart and checks every index in it, so that no later access can be out of range. Returns the config section too.
    pub fn open(blob: Bytes) -> Result<(Tables, Range<usize>), TextError> {
        if blob.len() < HEADER || blob[..7] != MAGIC[..7] {
            return Err(corrupt("it does not begin as a compiled tokenizer does"));
        }
        if blob[7] != MAGIC[7] {
            return Err(corrupt(format!(
                "format {} was found, format {} is read; build the plan anew",
                blob[7], MAGIC[7]
            )));
        }
        let mut sections: [Range<usize>; SECTIONS] = Default::default();
        let mut at = HEADER;
        for (i, section) in sections.iter_mut().enumerate() {
            let length = u64::from_le_bytes(blob[8 + i * 8..16 + i * 8].try_into().expect("8 bytes"));
            let end =
                usize::try_from(length).ok().and_then(|length| at.checked_add(length)).filter(|&end| end <= blob.len());
            let end = end.ok_or_else(|| {
                corrupt(format!("section {i} of {length} bytes ends beyond the blob's {} bytes", blob.len()))
            })?;
            *section = at..end;
            at = end;
        }
        if at != blob.len() {
            return Err(corrupt(format!("its sections end at byte {at} of {}", blob.len())));
        }
        let [config, offsets, slab, strings, merges] = sections;
        let tables = Tables { blob, offsets, slab, strings, merges };
        tables.check()?;
        Ok((tables, config))
    }

    fn check(&self) -> Result<(), TextError> {
        let (offsets, strings, merges) =
            (&self.blob[self.offsets.clone()], &self.blob[self.strings.clone()], &self.blob[self.merges.clone()]);
        if offsets.len() < 4 || offsets.len() % 4 != 0 || offsets.len() / 4 - 1 > u32::MAX as usize - 2 {
            return Err(corrupt(format!("a table of offsets of {} bytes", offsets.len())));
        }
        let mut last = 0;
        for bytes in offsets.chunks_exact(4) {
            let offset = u32_at(bytes, 0);
            if offset < last {
                return Err(corrupt("token offsets go backwards"));
            }
            last = offset;
        }
        if u32_at(offsets, 0) != 0 || last as usize != self.slab.len() {
            return Err(corrupt(format!("tokens of {last} bytes in a slab of {}", self.slab.len())));
        }
        let vocab = self.vocab_size();
        if strings.len() % 4 != 0
            || !(strings.len() / 4).is_power_of_two()
            || merges.len() % SLOT != 0
            || !(merges.len() / SLOT).is_power_of_two()
        {
            return Err(corrupt("a hash table whose size is no power of two"));
        }
        let mut free = false;
        for slot in strings.chunks_exact(4) {
            match u32_at(slot, 0) {
                0 => free = true,
                id if id as usize > vocab => return Err(corrupt(format!("token {} of {vocab}", id - 1))),
                _ => {}
            }
        }
        let mut free_merge = false;
        for slot in merges.chunks_exact(SLOT) {
            let [left, right, _, product] = [0, 1, 2, 3].map(|i| u32_at(slot, i));
            if left == FREE {
                free_merge = true;
            } else if [left, right, product].iter().any(|&id| id as usize >= vocab) {
                return Err(corrupt(format!("a merge of tokens {left} and {right} into {product} of {vocab}")));
            }
        }
        // A full table would send a search for a missing key round and round.
        if !free || !free_merge {
            return Err(corrupt("a hash table without a free slot"));
        }
        Ok(())
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.offsets.len() / 4 - 1
    }

    /// The bytes of token `id`, if there is such a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        if id >= self.vocab_size() {
            return None;
        }
        let offsets = &self.blob[self.offsets.clone()];
        let (start, end) = (u32_at(offsets, id) as usize, u32_at(offsets, id + 1) as usize);
        (start < end).then(|| &self.blob[self.slab.clone()][start..end])
    }

    /// The id of the token whose bytes are `piece`.
    pub fn find(&self, piece: &[u8]) -> Option<u32> {
        let strings = &self.blob[self.strings.clone()];
        let slots = strings.len() / 4;
        let mut slot = home(hash_bytes(piece), slots);
        loop {
            let id = u32_at(strings, slot).checked_sub(1)?;
            if self.token(id) == Some(piece) {
                return Some(id);
            }
            slot = (slot + 1) & (slots - 1);
        }
    }

    /// What the neighbours `left` and `right` merge into, if they do.
    #[inline]
    pub fn merge(&self, left: u32, right: u32) -> Option<Merge> {
        let (merges, _) = self.blob[self.merges.clone()].as_chunks::<SLOT>();
        let wanted = u64::from(right) << 32 | u64::from(left);
        let mut slot = home(hash_pair(left, right), merges.len());
        loop {
            let (key, value) = merges[slot].split_at(8);
            let key = u64::from_le_bytes(key.try_into().expect("8 bytes"));
            if key == wanted {
                return Some(Merge { rank: u32_at(value, 0), product: u32_at(value, 1) });
            }
            if key as u32 == FREE {
                return None;
            }
            slot = (slot + 1) & (merges.len() - 1);
        }
    }
}

/// What a blob is made of. `tokens[id]` may be empty; `named` are the ids that [`Tables::find`] knows; `merges` are (left, right, rank, product).
pub(crate) struct Parts<'a> {
    pub config: &'a [u8],
    pub tokens: &'a [Vec<u8>],
    pub named: &'a [u32],
    pub merges: &'a [[u32; 4]],
}

/// Lays out a blob. The same parts give the same bytes.
pub(crate) fn write(parts: &Parts<'_>) -> Result<Vec<u8>, TextError> {
    let slab_bytes: usize = parts.tokens.iter().map(Vec::len).sum();
    if u32::try_from(slab_bytes).is_err() {
        return Err(TextError::Checkpoint(format!("a vocabulary of {slab_bytes} bytes: at most {} fit", u32::MAX)));
    }
    let mut offsets = vec![0u32];
    let mut slab = Vec::with_capacity(slab_bytes);
    for token in parts.tokens {
        slab.extend_from_slice(token);
        offsets.push(slab.len() as u32);
    }
    let mut strings = vec![0u32; slots_for(parts.named.len())];
    for &id in parts.named {
        let mut slot = home(hash_bytes(&parts.tokens[id as usize]), strings.len());
        while strings[slot] != 0 {
            slot = (slot + 1) & (strings.len() - 1);
        }
        strings[slot] = id + 1;
    }
    let mut merges = vec![[FREE; 4]; slots_for(parts.merges.len())];
    for entry in parts.merges {
        let mut slot = home(hash_pair(entry[0], entry[1]), merges.len());
        while merges[slot][0] != FREE {
            slot = (slot + 1) & (merges.len() - 1);
        }
        merges[slot] = *entry;
    }
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let sections = [parts.config.to_vec(), words(&offsets), slab, words(&strings), words(merges.as_flattened())];
    let mut blob = MAGIC.to_vec();
    for section in &sections {
        blob.extend_from_slice(&(section.len() as u64).to_le_bytes());
    }
    blob.extend(sections.into_iter().flatten());
    Ok(blob)
}
