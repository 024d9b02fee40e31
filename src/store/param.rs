//! Parameters that know their types, so that a statement needs no round trip to learn them: where none
//! can be kept prepared, types travel with each.

use std::error::Error as StdError;
use std::time::SystemTime;

use bytes::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

/// A parameter of a statement.
pub(crate) trait Param: ToSql + Sync {
    /// The type that the statement has in its place.
    fn of_type(&self) -> Type;
}

macro_rules! params {
    ($($rust:ty = $one:ident, $many:ident;)*) => {$(
        impl Param for $rust {
            fn of_type(&self) -> Type {
                Type::$one
            }
        }

        impl Param for Option<$rust> {
            fn of_type(&self) -> Type {
                Type::$one
            }
        }

        impl Param for Vec<$rust> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for Vec<Option<$rust>> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for Option<Vec<$rust>> {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }

        impl Param for &[$rust] {
            fn of_type(&self) -> Type {
                Type::$many
            }
        }
    )*};
}

params! {
    bool = BOOL, BOOL_ARRAY;
    i32 = INT4, INT4_ARRAY;
    i64 = INT8, INT8_ARRAY;
    f64 = FLOAT8, FLOAT8_ARRAY;
    &str = TEXT, TEXT_ARRAY;
    &[u8] = BYTEA, BYTEA_ARRAY;
    String = TEXT, TEXT_ARRAY;
    Uuid = UUID, UUID_ARRAY;
    SystemTime = TIMESTAMPTZ, TIMESTAMPTZ_ARRAY;
}

/// A value whose type is not told by its own: an array in its packed form, or one that may be null.
#[derive(Debug)]
pub(crate) struct Typed<T>(pub(crate) T, pub(crate) Type);

impl<T: ToSql> ToSql for Typed<T> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    fn accepts(ty: &Type) -> bool {
        T::accepts(ty)
    }

    to_sql_checked!();
}

impl<T: ToSql + Sync> Param for Typed<T> {
    fn of_type(&self) -> Type {
        self.1.clone()
    }
}

/// The values alone.
pub(crate) fn values<'a>(params: &[&'a dyn Param]) -> Vec<&'a (dyn ToSql + Sync)> {
    params.iter().map(|param| *param as &(dyn ToSql + Sync)).collect()
}

/// The values with their types.
pub(crate) fn typed<'a>(params: &[&'a dyn Param]) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    params.iter().map(|param| (*param as &(dyn ToSql + Sync), param.of_type())).collect()
}
