//! Reads a TOML table key by key, and knows the line of each.
//!
//! What it is not: it knows no key of conet's; `parse` does. serde's derive was
//! not used because its errors name neither the key of a wrong value nor a
//! remedy.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Problem, Suggestion, TomlMessage};

/// The file being read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
}

impl<'a> Source<'a> {
    /// The file as a table.
    pub(super) fn table(self) -> Result<Spanned<DeTable<'a>>, ConfigError> {
        DeTable::parse(self.text).map_err(|error| {
            let line = self.line(error.span().unwrap_or(0..0));
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            self.wrong(line, "file", Problem::Syntax(TomlMessage(message)))
        })
    }

    /// The line, from 1, in which a span starts.
    pub(super) fn line(self, span: Range<usize>) -> usize {
        let end = span.start.min(self.text.len());
        1 + self.text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count()
    }

    /// The error for a key at a line.
    pub(super) fn wrong(
        self,
        line: usize,
        key: impl Into<String>,
        problem: impl Into<Problem>,
    ) -> ConfigError {
        ConfigError::Wrong {
            file: self.file.to_owned(),
            line,
            key: key.into(),
            problem: Box::new(problem.into()),
        }
    }
}

/// A value, with the line that it stands in.
#[derive(Debug, Clone)]
pub(super) struct Located<T> {
    pub(super) value: T,
    pub(super) line: usize,
}

/// One `[node]`, `[[peer]]` or `[[guest]]`.
#[derive(Debug)]
pub(super) struct Section<'a> {
    pub(super) source: Source<'a>,
    /// `node`, `peer`, `guest`.
    pub(super) name: &'static str,
    /// The line of its heading.
    pub(super) line: usize,
    entries: BTreeMap<String, Located<DeValue<'a>>>,
}

impl<'a> Section<'a> {
    /// Takes the table, whose keys must all be `known`.
    pub(super) fn new(
        source: Source<'a>,
        name: &'static str,
        value: Spanned<DeValue<'a>>,
        known: &[&str],
    ) -> Result<Self, ConfigError> {
        let line = source.line(value.span());
        let table = match value.into_inner() {
            DeValue::Table(table) => table,
            other => {
                let expected = "a section: [node], [[peer]] or [[guest]]";
                let problem = Problem::Type { found: type_name(&other), expected };
                return Err(source.wrong(line, name, problem));
            }
        };
        let mut entries = BTreeMap::new();
        for (key, value) in table {
            let line = source.line(key.span());
            let key = key.into_inner().into_owned();
            if !known.contains(&key.as_str()) {
                let suggestion = Suggestion::of(&key, known.iter().copied());
                let problem = Problem::UnknownKey(suggestion);
                return Err(source.wrong(line, format!("{name}.{key}"), problem));
            }
            entries.insert(key, Located { value: value.into_inner(), line });
        }
        Ok(Self { source, name, line, entries })
    }

    /// The error for one of this section's keys.
    pub(super) fn wrong(&self, line: usize, key: &str, problem: impl Into<Problem>) -> ConfigError {
        self.source.wrong(line, format!("{}.{key}", self.name), problem)
    }

    /// The error for a key that is not there.
    pub(super) fn missing(&self, key: &str, remedy: &'static str) -> ConfigError {
        self.wrong(self.line, key, Problem::Missing { remedy })
    }

    /// Whether a key is there that was not read yet.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// A string, or nothing where the key is absent.
    pub(super) fn string(
        &mut self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<Located<String>>, ConfigError> {
        let Some(Located { value, line }) = self.entries.remove(key) else { return Ok(None) };
        match value {
            DeValue::String(text) => Ok(Some(Located { value: text.into_owned(), line })),
            other => Err(self.wrong_type(line, key, &other, expected)),
        }
    }

    /// A string that stands for a `T`.
    pub(super) fn parsed<T: FromStr>(
        &mut self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<Located<T>>, ConfigError> {
        let Some(text) = self.string(key, expected)? else { return Ok(None) };
        self.parse(key, text, expected).map(Some)
    }

    fn parse<T: FromStr>(
        &self,
        key: &str,
        text: Located<String>,
        expected: &'static str,
    ) -> Result<Located<T>, ConfigError> {
        match text.value.parse() {
            Ok(value) => Ok(Located { value, line: text.line }),
            Err(_) => {
                Err(self.wrong(text.line, key, Problem::Value { value: text.value, expected }))
            }
        }
    }

    /// A string that stands for a `T`, or a list of such; empty where the key is absent.
    pub(super) fn one_or_more<T: FromStr>(
        &mut self,
        key: &str,
        expected: &'static str,
    ) -> Result<Vec<Located<T>>, ConfigError> {
        match self.entries.get(key) {
            Some(Located { value: DeValue::Array(_), .. }) => self.list(key, expected),
            _ => Ok(self.parsed(key, expected)?.into_iter().collect()),
        }
    }

    /// A list of strings that stand for `T`s; empty where the key is absent.
    pub(super) fn list<T: FromStr>(
        &mut self,
        key: &str,
        expected: &'static str,
    ) -> Result<Vec<Located<T>>, ConfigError> {
        let Some(Located { value, line }) = self.entries.remove(key) else { return Ok(Vec::new()) };
        let DeValue::Array(items) = value else {
            return Err(self.wrong_type(line, key, &value, expected));
        };
        let mut values = Vec::with_capacity(items.len());
        for item in items {
            let line = self.source.line(item.span());
            match item.into_inner() {
                DeValue::String(text) => {
                    let text = Located { value: text.into_owned(), line };
                    values.push(self.parse(key, text, expected)?);
                }
                other => return Err(self.wrong_type(line, key, &other, expected)),
            }
        }
        Ok(values)
    }

    /// An integer in the range of `T`.
    pub(super) fn integer<T: TryFrom<i64>>(
        &mut self,
        key: &str,
        expected: &'static str,
    ) -> Result<Option<Located<T>>, ConfigError> {
        let Some(Located { value, line }) = self.entries.remove(key) else { return Ok(None) };
        let DeValue::Integer(integer) = value else {
            return Err(self.wrong_type(line, key, &value, expected));
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix());
        match number.ok().and_then(|number| T::try_from(number).ok()) {
            Some(value) => Ok(Some(Located { value, line })),
            None => {
                let value = integer.to_string();
                Err(self.wrong(line, key, Problem::Value { value, expected }))
            }
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some(Located { value, line }) = self.entries.remove(key) else { return Ok(None) };
        match value {
            DeValue::Boolean(value) => Ok(Some(value)),
            other => Err(self.wrong_type(line, key, &other, "true or false")),
        }
    }

    fn wrong_type(
        &self,
        line: usize,
        key: &str,
        value: &DeValue<'_>,
        expected: &'static str,
    ) -> ConfigError {
        self.wrong(line, key, Problem::Type { found: type_name(value), expected })
    }
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
