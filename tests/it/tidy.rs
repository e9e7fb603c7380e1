//! Rules about the code itself, which no compiler knows.
//!
//! Each test walks the files that its rule concerns, and fails with every place that breaks it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The only places where `unsafe` may stand: the drivers, and where a descriptor is adopted.
const UNSAFE_ALLOWED: [&str; 2] = ["src/driver/", "src/server"];

/// A file of the repository, with its text taken apart line by line.
struct Source {
    /// From the top of the repository.
    path: String,
    text: String,
    lines: Vec<Line>,
}

/// One line of Rust: what the compiler sees (texts emptied), and what stands in its comments.
#[derive(Default)]
struct Line {
    code: String,
    comment: String,
}

#[test]
fn unsafe_code_stands_in_the_drivers_only() {
    let mut broken = Vec::new();
    for source in rust_below(&["src", "examples"]) {
        if !UNSAFE_ALLOWED.iter().any(|allowed| source.path.starts_with(allowed)) {
            broken.extend(source.places(|line| has_word(&line.code, "unsafe")));
        }
    }
    expect_none(&broken, "unsafe outside of src/driver/ and src/server/");
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let mut broken = Vec::new();
    for source in rust_below(&["src", "tests", "benches", "examples"]) {
        for (index, line) in source.lines.iter().enumerate() {
            let block = has_word(&line.code, "unsafe") && !line.code.contains("unsafe fn");
            if block && !source.comment_above(index).contains("SAFETY:") {
                broken.push(source.place(index));
            }
            if line.code.contains("unsafe fn") && !source.comment_above(index).contains("# Safety") {
                broken.push(source.place(index));
            }
        }
    }
    expect_none(&broken, "unsafe without a SAFETY comment above it");
}

#[test]
fn the_protocol_knows_nothing_but_its_configuration() {
    let mut broken = Vec::new();
    for source in rust_below(&["src/http1"]) {
        broken.extend(source.imports_beyond(|module| ["config", "http1"].contains(&module)));
        let outside = ["std::net", "std::fs", "libc", "Instant::now", "SystemTime::now"];
        broken.extend(source.places(|line| names_any(&line.code, &outside)));
    }
    expect_none(&broken, "src/http1 may use config and http1 only, and neither clock nor system");
}

#[test]
fn the_engine_makes_no_system_call() {
    let engine = rust_below(&["src/shard"]).into_iter().find(|source| source.path == "src/shard/engine.rs");
    let engine = engine.expect("src/shard/engine.rs");
    let broken = engine.places(|line| {
        let calls = line.code.match_indices("libc::").any(|(at, name)| {
            // Constants (libc::EMFILE) are numbers; what begins with a small letter is a call.
            line.code[at + name.len()..].starts_with(|first: char| first.is_ascii_lowercase())
        });
        calls || names_any(&line.code, &["Instant::now", "SystemTime::now", "std::net", "std::fs", "std::thread", "TcpStream"])
    });
    expect_none(&broken, "the engine is given the time and asks for operations, it does not take them");
}

#[test]
fn the_drivers_know_nothing_of_http() {
    let mut broken = Vec::new();
    for source in rust_below(&["src/driver"]) {
        broken.extend(source.imports_beyond(|module| !["http1", "handler", "server", "cli"].contains(&module)));
    }
    expect_none(&broken, "src/driver may not look up");
}

#[test]
fn every_kernel_note_names_a_test_that_exists() {
    let tests = test_names();
    let notes = files_below(&["kernel-notes"], "md");
    assert!(!notes.is_empty(), "no kernel notes");
    let mut broken = Vec::new();
    for path in notes {
        let text = read(&path);
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        if !words.into_iter().any(|word| tests.contains(word)) {
            broken.push(path);
        }
    }
    expect_none(&broken, "kernel notes that name no test");
}

/// `kernel-notes/x.md`, `src/x.rs`, `tests/it/x.rs`, ... in comments and pages.
#[test]
fn every_file_that_is_cited_exists() {
    let mut broken = Vec::new();
    let mut pages = files_below(&["src", "tests", "benches", "examples"], "rs");
    pages.extend(files_below(&["kernel-notes", "benches", "docs"], "md"));
    pages.extend(["README.md".to_owned()].into_iter().filter(|page| root().join(page).exists()));
    for page in pages.iter().filter(|page| !page.ends_with("tidy.rs")) {
        for cited in cited_files(&read(page)) {
            if !root().join(&cited).exists() {
                broken.push(format!("{page} cites {cited}"));
            }
        }
    }
    expect_none(&broken, "files that are cited and do not exist");
}

#[test]
fn nothing_is_left_to_do() {
    let mut broken = Vec::new();
    let folders = ["src", "tests", "benches", "examples", "scripts", "kernel-notes", "python"];
    for path in ["rs", "md", "py", "sh", "toml"].iter().flat_map(|kind| files_below(&folders, kind)) {
        for (number, line) in read(&path).lines().enumerate() {
            if [concat!("TO", "DO"), concat!("FIX", "ME")].iter().any(|mark| has_word(line, mark)) {
                broken.push(format!("{path}:{}", number + 1));
            }
        }
    }
    expect_none(&broken, "notes to self");
}

#[test]
fn every_file_of_the_program_begins_with_what_it_is_for() {
    let sources = rust_below(&["src", "tests", "benches", "examples"]).into_iter();
    let broken: Vec<_> = sources.filter(|source| !source.text.starts_with("//!")).map(|source| source.path).collect();
    expect_none(&broken, "files without a //! line at their top");
}

#[test]
fn the_reader_of_code_sees_neither_comments_nor_texts() {
    let source = Source::new(
        "x.rs".to_owned(),
        "let a = \"unsafe \\\" //\"; // unsafe\n/* unsafe\n unsafe */ let b = r#\"unsafe \" \"#; let c = '\"'; unsafe {}\n\
         fn f<'a>(x: &'a str) {} // '\n"
            .to_owned(),
    );
    let code: Vec<_> = source.lines.iter().map(|line| line.code.trim()).collect();
    assert_eq!(code[0], "let a = \"\";");
    assert_eq!(code[2], "let b = r#\"\"#; let c = ''; unsafe {}");
    assert_eq!(code[3], "fn f<'a>(x: &'a str) {}");
    assert!(source.lines[0].comment.contains("unsafe") && source.lines[1].comment.contains("unsafe"));
}

#[test]
fn the_reader_of_code_sees_what_is_imported() {
    let source = Source::new(
        "x.rs".to_owned(),
        "use crate::config::Limits;\nuse crate::{\n    a::{B, C},\n    d::{self, e::F},\n    g,\n};\nlet x = crate::h::i();\n".to_owned(),
    );
    let named = |module: &str| !source.imports_beyond(|other| other != module).is_empty();
    assert!(["config", "a", "d", "g", "h"].into_iter().all(named));
    assert!(!["B", "C", "e", "i", "Limits", ""].into_iter().any(named));
}

// ---------------------------------------------------------------------------------- reading files

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Paths of the files of a kind in these folders, at any depth.
fn files_below(folders: &[&str], kind: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                let ignored = path.file_name().is_some_and(|name| name == "target" || name == "corpus");
                waiting.extend((!ignored).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == kind) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn rust_below(folders: &[&str]) -> Vec<Source> {
    let sources: Vec<_> = files_below(folders, "rs").into_iter().map(|path| Source::new(path.clone(), read(&path))).collect();
    assert!(!sources.is_empty(), "no Rust files in {folders:?}");
    sources
}

/// Names of all functions marked as tests.
fn test_names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for source in rust_below(&["src", "tests"]) {
        let mut marked = false;
        for line in &source.lines {
            let code = line.code.trim();
            marked |= code.starts_with("#[test]");
            if let Some(name) = code.strip_prefix("fn ").filter(|_| marked) {
                names.insert(name.split(['(', '<']).next().unwrap().to_owned());
                marked = false;
            }
        }
    }
    names
}

impl Source {
    fn new(path: String, text: String) -> Source {
        let lines = lines(&text);
        Source { path, text, lines }
    }

    fn place(&self, index: usize) -> String {
        format!("{}:{}: {}", self.path, index + 1, self.text.lines().nth(index).unwrap_or("").trim())
    }

    fn places(&self, broken: impl Fn(&Line) -> bool) -> Vec<String> {
        (0..self.lines.len()).filter(|index| broken(&self.lines[*index])).map(|index| self.place(index)).collect()
    }

    /// Places that name a module of the crate which `allowed` does not know.
    fn imports_beyond(&self, allowed: impl Fn(&str) -> bool) -> Vec<String> {
        let code: Vec<&str> = self.lines.iter().map(|line| line.code.as_str()).collect();
        let code = code.join("\n");
        let named = modules_named(&code).into_iter().filter(|(_, module)| !allowed(module));
        named.map(|(at, _)| self.place(code[..at].matches('\n').count())).collect()
    }

    /// The comment of this line and those right above the statement or item that it belongs to.
    fn comment_above(&self, index: usize) -> String {
        let mut comment = self.lines[index].comment.clone();
        let mut seen_comment = false;
        for line in self.lines[..index].iter().rev() {
            let code = line.code.trim();
            let is_comment = code.is_empty() && !line.comment.is_empty();
            let in_statement = !code.is_empty() && !code.ends_with([';', '{', '}']);
            let attribute = code.starts_with("#[");
            if !(is_comment || (!seen_comment && (in_statement || attribute))) {
                break;
            }
            seen_comment |= is_comment;
            comment = line.comment.clone() + "\n" + &comment;
        }
        comment
    }
}

/// Takes Rust apart, without the texts: comments nest, texts may be raw, a quote may be a lifetime's.
fn lines(text: &str) -> Vec<Line> {
    enum In {
        Code,
        LineComment,
        BlockComment(usize),
        Text,
        RawText(usize),
    }
    let mut lines = vec![Line::default()];
    let mut state = In::Code;
    let characters: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < characters.len() {
        let (here, next) = (characters[at], characters.get(at + 1).copied().unwrap_or('\n'));
        let line = lines.last_mut().unwrap();
        at += 1;
        if here == '\n' {
            lines.push(Line::default());
            if matches!(state, In::LineComment) {
                state = In::Code;
            }
            continue;
        }
        match state {
            In::Code if here == '/' && next == '/' => {
                state = In::LineComment;
                line.comment.push('/');
            }
            In::Code if here == '/' && next == '*' => {
                state = In::BlockComment(1);
                at += 1;
            }
            In::Code if here == '"' => {
                let hashes = line.code.chars().rev().take_while(|c| *c == '#').count();
                let raw = line.code[..line.code.len() - hashes].ends_with('r');
                line.code.push('"');
                state = if raw { In::RawText(hashes) } else { In::Text };
            }
            In::Code if here == '\'' && (next == '\\' || characters.get(at + 1) == Some(&'\'')) => {
                // A character. Its quote is the first one behind at least one character.
                let from = at + if next == '\\' { 2 } else { 1 };
                at = (from..characters.len()).find(|at| characters[*at] == '\'').map_or(characters.len(), |at| at + 1);
                line.code.push_str("''");
            }
            In::Code => line.code.push(here),
            In::LineComment => line.comment.push(here),
            In::BlockComment(depth) if here == '*' && next == '/' => {
                at += 1;
                state = if depth == 1 { In::Code } else { In::BlockComment(depth - 1) };
            }
            In::BlockComment(depth) => {
                if here == '/' && next == '*' {
                    state = In::BlockComment(depth + 1);
                }
                line.comment.push(here);
            }
            In::Text if here == '\\' => {
                // The escaped character is skipped, unless it is the end of the line.
                at += usize::from(next != '\n');
            }
            In::Text if here == '"' => {
                line.code.push('"');
                state = In::Code;
            }
            In::RawText(hashes) if here == '"' && characters[at..].iter().take(hashes).all(|c| *c == '#') => {
                line.code.push('"');
                state = In::Code;
            }
            In::Text | In::RawText(_) => {}
        }
    }
    lines
}

// ---------------------------------------------------------------------------------- looking at lines

fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

fn names_any(code: &str, words: &[&str]) -> bool {
    words.iter().any(|word| has_word(code, word))
}

/// The modules that code names as `crate::MODULE`, or in `use crate::{MODULE::..., ...}`, and where.
fn modules_named(code: &str) -> Vec<(usize, &str)> {
    let word = |from: usize| {
        let at = code.len() - code[from..].trim_start().len();
        let end = code[at..].find(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(code.len(), |end| at + end);
        (at, &code[at..end])
    };
    let mut found = Vec::new();
    for (at, name) in code.match_indices("crate::") {
        let from = at + name.len();
        if !code[from..].starts_with('{') {
            found.push(word(from));
            continue;
        }
        let mut depth = 0;
        for (offset, character) in code[from..].char_indices() {
            depth += i32::from(character == '{') - i32::from(character == '}');
            if depth == 0 {
                break;
            } else if depth == 1 && (character == '{' || character == ',') {
                found.push(word(from + offset + 1));
            }
        }
    }
    found.retain(|(_, module)| !module.is_empty());
    found
}

/// What looks like a path of a file of this repository.
fn cited_files(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_alphanumeric() || "_-./".contains(c)));
    let known = ["src/", "tests/", "kernel-notes/", "benches/", "examples/", "scripts/", "docs/"];
    let path = |word: &str| {
        let word = word.trim_end_matches('.');
        let file = word.rsplit('/').next().unwrap();
        (known.iter().any(|folder| word.starts_with(folder)) && file.contains('.')).then(|| word.to_owned())
    };
    words.filter_map(path).collect()
}

fn expect_none(broken: &[String], rule: &str) {
    assert!(broken.is_empty(), "{rule}:\n{}", broken.join("\n"));
}
