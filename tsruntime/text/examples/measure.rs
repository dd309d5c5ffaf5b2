//! How long a compiled tokenizer takes to open, and a text to encode: `measure DIR TEXT_FILE`, DIR from `tstext compile`.

use std::time::Instant;

use tsruntime_text::{EncodeOptions, Tokenizer};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, file] = &arguments[..] else { panic!("measure DIR TEXT_FILE") };
    let text = std::fs::read_to_string(file).expect("a text file");
    let start = Instant::now();
    let blob = std::fs::read(format!("{dir}/tokenizer")).expect("a compiled tokenizer");
    let read_ms = start.elapsed().as_secs_f64() * 1e3;
    let tokenizer = Tokenizer::open(blob.into()).expect("a tokenizer");
    let open_ms = start.elapsed().as_secs_f64() * 1e3;
    // The first encoding, as after a start, and the fastest of ten.
    let mut times_ms = Vec::new();
    let mut tokens = 0;
    for _ in 0..10 {
        let start = Instant::now();
        tokens = tokenizer.encode(&text, &EncodeOptions::default()).len();
        times_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let best_ms = times_ms.iter().copied().fold(f64::MAX, f64::min);
    let per_50k = 50_000.0 / tokens as f64;
    println!(
        r#"{{"read_ms":{read_ms:.2},"read_and_open_ms":{open_ms:.2},"tokens":{tokens},"first_ms_per_50k":{:.2},"best_ms_per_50k":{:.2}}}"#,
        times_ms[0] * per_50k,
        best_ms * per_50k
    );
}
