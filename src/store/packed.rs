//! Arrays of a batch in Postgres' binary format, built in place as messages arrive and read without
//! a copy for each element.

use std::error::Error as StdError;
use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

/// A one-dimensional array to be sent.
#[derive(Debug, Default, Clone)]
pub(crate) struct Packed {
    count: u32,
    nulls: bool,
    body: BytesMut,
}

impl Packed {
    /// An array of so many nulls.
    pub(crate) fn of_nulls(count: u32) -> Self {
        let mut packed = Self::default();
        (0..count).for_each(|_| packed.push_null());
        packed
    }

    pub(crate) fn push(&mut self, element: &[u8]) {
        self.push_parts(&[], element);
    }

    /// A `jsonb` element: the format's version, then the text.
    pub(crate) fn push_json(&mut self, text: &[u8]) {
        self.push_parts(&[1], text);
    }

    pub(crate) fn push_null(&mut self) {
        self.count += 1;
        self.nulls = true;
        self.body.put_i32(-1);
    }

    fn push_parts(&mut self, prefix: &[u8], element: &[u8]) {
        self.count += 1;
        self.body.reserve(4 + prefix.len() + element.len());
        self.body.put_i32(i32::try_from(prefix.len() + element.len()).unwrap_or(i32::MAX));
        self.body.put_slice(prefix);
        self.body.put_slice(element);
    }

    /// The same elements, of some places only.
    pub(crate) fn part(&self, places: Range<usize>) -> Self {
        let (all, mut part) = (self.unpack(), Self::default());
        for index in places {
            match all.element(index) {
                Some(element) => part.push(element),
                None => part.push_null(),
            }
        }
        part
    }

    /// The elements again, as they were pushed (with a `jsonb` element's version byte).
    pub(crate) fn unpack(&self) -> Unpacked {
        Unpacked::from_body(self.count as usize, self.body.clone().freeze())
    }
}

/// The most dimensions of an array in Postgres.
const MAX_DIMENSIONS: usize = 6;

fn product(count: usize, length: Option<usize>) -> Option<usize> {
    count.checked_mul(length?)
}

fn element_type(array: &Type) -> Option<Type> {
    match *array {
        Type::BYTEA_ARRAY => Some(Type::BYTEA),
        Type::TEXT_ARRAY => Some(Type::TEXT),
        Type::JSONB_ARRAY => Some(Type::JSONB),
        _ => None,
    }
}

impl ToSql for Packed {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        let element = element_type(ty).ok_or("not an array of bytea, text or jsonb")?;
        out.reserve(20 + self.body.len());
        out.put_i32(1);
        out.put_i32(i32::from(self.nulls));
        out.put_u32(element.oid());
        out.put_u32(self.count);
        out.put_i32(1);
        out.put_slice(&self.body);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        element_type(ty).is_some()
    }

    to_sql_checked!();
}

/// To be sent again as it was received.
impl<'a> FromSql<'a> for Packed {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        let read = Unpacked::from_sql(ty, raw)?;
        let count = u32::try_from(read.len())?;
        let nulls = (0..read.len()).any(|index| read.element(index).is_none());
        Ok(Self { count, nulls, body: BytesMut::from(&read.body[..]) })
    }

    fn accepts(ty: &Type) -> bool {
        element_type(ty).is_some()
    }
}

/// An array as received: one buffer, and where its elements are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unpacked {
    body: Bytes,
    /// Start and length of each element; a null has the length `u32::MAX`.
    elements: Box<[(u32, u32)]>,
}

impl Unpacked {
    fn from_body(count: usize, body: Bytes) -> Self {
        let mut elements = Vec::with_capacity(count.min(body.len() / 4));
        let mut at = 0_usize;
        while let Some(length) = at.checked_add(4).and_then(|end| body.get(at..end)) {
            let length = i32::from_be_bytes([length[0], length[1], length[2], length[3]]);
            at += 4;
            let start = u32::try_from(at).unwrap_or(u32::MAX);
            let length = u32::try_from(length).unwrap_or(u32::MAX);
            elements.push((start, length));
            at = at.saturating_add(if length == u32::MAX { 0 } else { length as usize });
        }
        Self { body, elements: elements.into() }
    }

    pub(crate) fn len(&self) -> usize {
        self.elements.len()
    }

    /// Whether all elements end within the buffer.
    fn is_whole(&self) -> bool {
        let end = |(start, length): &(u32, u32)| {
            let length = if *length == u32::MAX { 0 } else { *length };
            start.checked_add(length).is_some_and(|end| end as usize <= self.body.len())
        };
        self.elements.iter().all(end)
    }

    /// The element at an index; none for a null or beyond the end.
    pub(crate) fn element(&self, index: usize) -> Option<&[u8]> {
        let (start, length) = *self.elements.get(index)?;
        let end = (start as usize).checked_add(length as usize)?;
        self.body.get(start as usize..end)
    }

    /// The same, sharing the buffer.
    pub(crate) fn bytes(&self, index: usize) -> Option<Bytes> {
        let (start, length) = *self.elements.get(index)?;
        if length == u32::MAX {
            return None;
        }
        Some(self.body.slice(start as usize..start as usize + length as usize))
    }
}

impl<'a> FromSql<'a> for Unpacked {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        let word = |at: usize| -> Option<i32> {
            raw.get(at..at + 4).map(|b| i32::from_be_bytes([b[0], b[1], b[2], b[3]]))
        };
        let dimensions = usize::try_from(word(0).ok_or("array too short")?)?;
        if dimensions == 0 {
            return Ok(Self::default());
        }
        // Elements lie one after the other, however many dimensions there are and wherever they begin.
        let lengths = (0..dimensions.min(MAX_DIMENSIONS)).map(|n| word(12 + 8 * n));
        let count = lengths.map(|length| usize::try_from(length?).ok()).try_fold(1, product);
        let count = count.ok_or("array too short")?;
        let body = raw.get(12 + 8 * dimensions..).ok_or("array too short")?;
        let unpacked = Self::from_body(count, Bytes::copy_from_slice(body));
        if unpacked.len() == count && unpacked.is_whole() {
            Ok(unpacked)
        } else {
            Err("array cut short".into())
        }
    }

    fn accepts(ty: &Type) -> bool {
        element_type(ty).is_some()
    }
}

/// A `jsonb` value as the server writes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Json<'a>(pub(crate) &'a [u8]);

impl<'a> FromSql<'a> for Json<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        // Behind the format's version.
        raw.strip_prefix(&[1]).map(Self).ok_or_else(|| "a format of jsonb that is not known".into())
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arrays_read_as_they_were_built(elements: Vec<Option<Vec<u8>>>) {
            let mut packed = Packed::default();
            for element in &elements {
                match element {
                    Some(bytes) => packed.push(bytes),
                    None => packed.push_null(),
                }
            }
            let mut wire = BytesMut::new();
            packed.to_sql(&Type::BYTEA_ARRAY, &mut wire).unwrap();
            let read = Unpacked::from_sql(&Type::BYTEA_ARRAY, &wire).unwrap();
            let again = Packed::from_sql(&Type::BYTEA_ARRAY, &wire).unwrap();
            let mut sent = BytesMut::new();
            again.to_sql(&Type::BYTEA_ARRAY, &mut sent).unwrap();
            prop_assert!(elements.is_empty() || sent == wire);
            let unpacked = packed.unpack();
            prop_assert_eq!(read.len(), elements.len());
            for (index, element) in elements.iter().enumerate() {
                let bytes = read.bytes(index);
                prop_assert_eq!(read.element(index), element.as_deref());
                prop_assert_eq!(bytes.as_deref(), element.as_deref());
                prop_assert_eq!(unpacked.element(index), element.as_deref());
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(
            dimensions in 0_i32..9,
            lengths: [u8; 3],
            wire: Vec<u8>,
        ) {
            let mut framed = BytesMut::new();
            framed.put_i32(dimensions);
            framed.put_i64(0);
            for length in lengths {
                framed.put_i32(i32::from(length % 4));
                framed.put_i32(1);
            }
            framed.put_slice(&wire);
            for wire in [&wire[..], &framed[..]] {
                let Ok(read) = Unpacked::from_sql(&Type::BYTEA_ARRAY, wire) else { continue };
                for index in 0..=read.len() {
                    let bytes = read.bytes(index);
                    prop_assert_eq!(bytes.as_deref(), read.element(index));
                }
            }
        }

        #[test]
        fn arrays_of_more_dimensions_read_as_one(rows in 1_usize..4, elements in 1_i32..4) {
            let mut packed = Packed::default();
            let count = rows * usize::try_from(elements).unwrap();
            (0..count).for_each(|n| packed.push(n.to_string().as_bytes()));
            let mut wire = BytesMut::new();
            wire.put_i32(2);
            wire.put_i32(0);
            wire.put_u32(Type::TEXT.oid());
            for (length, first) in [(i32::try_from(rows).unwrap(), 0), (elements, -7)] {
                wire.put_i32(length);
                wire.put_i32(first);
            }
            wire.put_slice(&packed.body);
            let read = Unpacked::from_sql(&Type::TEXT_ARRAY, &wire).unwrap();
            let texts: Vec<_> = (0..read.len()).filter_map(|n| read.element(n)).collect();
            let expected: Vec<String> = (0..count).map(|n| n.to_string()).collect();
            prop_assert_eq!(texts, expected.iter().map(String::as_bytes).collect::<Vec<_>>());
        }
    }
}
