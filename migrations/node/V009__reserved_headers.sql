-- A message that is stored a second time carries its first identity, and perhaps a mark, in headers of
-- ShardMQ's own: these do not count towards the limit of 64 KiB, which the first copy may have used up.
-- A function that the tables' checks call is replaced: no lock on any table.
create or replace function shardmq.headers_fit(headers jsonb[]) returns boolean
    language sql immutable
    return (
        select coalesce(bool_and(jsonb_typeof(h) = 'object' and
            (select coalesce(sum(octet_length(e.key) + octet_length(e.value)), 0) <= 65536
               from jsonb_each_text(case when jsonb_typeof(h) = 'object' then h else '{}' end) e
              where e.key not in ('shardmq.uid', 'shardmq.duplicate'))), true)
          from unnest(headers) h);
