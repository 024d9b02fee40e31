//! Who may execute the functions of the schema: its owner, and whom they are granted to. A dump that was
//! restored without its privileges (`pg_dump -x`) has given all of them to everybody.

use tokio_postgres::Client;

use crate::error::{Error, ErrorKind, Result};
use crate::store::connect;
use crate::store::sql;

/// Takes back from everybody what only some may do. Says what it has done, if anything.
pub(super) async fn repair(client: &Client, what: &str) -> Result<Option<String>> {
    let refused = |error| connect::refused(error, what);
    let rows = client.query(sql::RIGHTS, &[]).await.map_err(refused)?;
    let mut revoked = 0;
    for row in &rows {
        let (function, is_ours, owner): (&str, bool, &str) = (row.get(0), row.get(1), row.get(2));
        if !is_ours {
            let text = format!(
                "{what}: everybody may execute {function}, which belongs to {owner}: migrate as {owner}"
            );
            return Err(Error::new(ErrorKind::Incompatible, text));
        }
        let revoke = format!("revoke execute on routine {function} from public");
        client.batch_execute(&revoke).await.map_err(refused)?;
        revoked += 1;
    }
    if revoked == 0 {
        return Ok(None);
    }
    tracing::warn!(
        functions = revoked,
        alert = "rights",
        "everybody could execute functions of the schema: revoked. Grant them anew to your own roles"
    );
    Ok(Some(format!("rights: execute on {revoked} functions revoked from public")))
}
