//! Byte pair encoding of one word, in the order of Hugging Face's `Word::merge_all`: lowest rank first, leftmost first among equals.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::tables::{Merge, Tables};

/// Up to this many symbols, looking for the lowest rank again after each merge beats a heap.
const SCAN_MAX: usize = 24;
const NONE: u32 = u32::MAX;

/// A symbol of the word, and what it merges into with the symbol after it.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    rank: u32,
    product: u32,
}

#[derive(Clone, Copy)]
struct Node {
    id: u32,
    prev: u32,
    next: u32,
    alive: bool,
}

/// Buffers that live as long as one text is being encoded.
#[derive(Default)]
pub(crate) struct Merger {
    /// The word: set by the caller, consumed by [`Merger::merge`].
    pub word: Vec<u32>,
    symbols: Vec<Symbol>,
    nodes: Vec<Node>,
    // (rank, position) in one number, and the product.
    heap: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Merger {
    /// Merges `word` and appends the result to `out`.
    pub fn merge(&mut self, tables: &Tables, out: &mut Vec<u32>) {
        match self.word.len() {
            0 => {}
            1 => out.push(self.word[0]),
            2..=SCAN_MAX => self.scan(tables, out),
            _ => self.queue(tables, out),
        }
        self.word.clear();
    }

    fn scan(&mut self, tables: &Tables, out: &mut Vec<u32>) {
        let symbols = &mut self.symbols;
        symbols.clear();
        symbols.extend(self.word.iter().map(|&id| Symbol { id, rank: NONE, product: 0 }));
        let pair = |symbols: &mut Vec<Symbol>, at: usize| {
            let merge = symbols.get(at + 1).and_then(|right| tables.merge(symbols[at].id, right.id));
            let Merge { rank, product } = merge.unwrap_or(Merge { rank: NONE, product: 0 });
            symbols[at].rank = rank;
            symbols[at].product = product;
        };
        for at in 0..symbols.len() - 1 {
            pair(symbols, at);
        }
        loop {
            let mut best = 0;
            for at in 1..symbols.len() {
                if symbols[at].rank < symbols[best].rank {
                    best = at;
                }
            }
            if symbols[best].rank == NONE {
                break;
            }
            symbols[best].id = symbols[best].product;
            symbols.remove(best + 1);
            pair(symbols, best);
            if best > 0 {
                pair(symbols, best - 1);
            }
        }
        out.extend(symbols.iter().map(|symbol| symbol.id));
    }

    fn queue(&mut self, tables: &Tables, out: &mut Vec<u32>) {
        let Merger { word, nodes, heap, .. } = self;
        let last = word.len() as u32 - 1;
        nodes.clear();
        nodes.extend((0..=last).zip(word.iter()).map(|(at, &id)| Node {
            id,
            prev: at.wrapping_sub(1),
            next: if at == last { NONE } else { at + 1 },
            alive: true,
        }));
        heap.clear();
        let entry = |at: u32, merge: Merge| Reverse((u64::from(merge.rank) << 32 | u64::from(at), merge.product));
        let pairs = (0u32..).zip(word.windows(2));
        heap.extend(pairs.filter_map(|(at, pair)| tables.merge(pair[0], pair[1]).map(|merge| entry(at, merge))));
        while let Some(Reverse((key, product))) = heap.pop() {
            let at = key as u32;
            let node = nodes[at as usize];
            if !node.alive || node.next == NONE {
                continue;
            }
            let right = nodes[node.next as usize];
            // The neighbours may have changed since this entry was made.
            if tables.merge(node.id, right.id).is_none_or(|merge| merge.product != product) {
                continue;
            }
            nodes[node.next as usize].alive = false;
            nodes[at as usize] = Node { id: product, next: right.next, ..node };
            if right.next != NONE {
                nodes[right.next as usize].prev = at;
                let merge = tables.merge(product, nodes[right.next as usize].id);
                heap.extend(merge.map(|merge| entry(at, merge)));
            }
            if node.prev != NONE {
                let merge = tables.merge(nodes[node.prev as usize].id, product);
                heap.extend(merge.map(|merge| entry(node.prev, merge)));
            }
        }
        out.extend(nodes.iter().filter(|node| node.alive).map(|node| node.id));
    }
}
