-- Why a message was not acknowledged inside a user's transaction. A statement of its own: it sees what
-- that one has waited for. A visible row whose writer is still in progress is this transaction's own, or
-- one of its savepoints': what it says may be rolled back. Names are whole: the user's search_path may be
-- anything. No row: the transaction is not on the partition's node.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation
select case when pg_catalog.pg_postmaster_start_time() operator(pg_catalog.<>) $6 then 'other_server'
            when (c.owner operator(pg_catalog.=) $3 and c.epoch operator(pg_catalog.=) $4) is not true
                 then 'lease_lost'
            when c.reset_epoch operator(pg_catalog.<>) $5 then 'reset'
            -- xmin is the lower half of the number; savepoints have higher ones than their transaction.
            when mine.since operator(pg_catalog.<) 2147483648
                 and pg_catalog.pg_xact_status(
                         (mine.first operator(pg_catalog.+) mine.since)::pg_catalog.text::pg_catalog.xid8)
                     operator(pg_catalog.=) 'in progress'
                 then 'uncommitted'
            else 'acknowledged' end
  from shardmq.partition p
  left join shardmq.cursor c
    on c.group_name operator(pg_catalog.=) $1 and c.partition operator(pg_catalog.=) p.partition
 cross join lateral (
       select t.first,
              pg_catalog.mod(c.xmin::pg_catalog.text::numeric
                                 operator(pg_catalog.-) pg_catalog.mod(t.first, 4294967296)
                                 operator(pg_catalog.+) 4294967296, 4294967296) as since
         from (select pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text::numeric as first) t) mine
 where p.partition operator(pg_catalog.=) $2
