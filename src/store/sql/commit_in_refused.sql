-- Why a message was not acknowledged inside a user's transaction. A statement of its own: it sees what
-- that one has waited for. A visible row whose writer is still in progress is this transaction's own, or
-- one of its savepoints': what it says may be rolled back. No row: the transaction is not on the partition's
-- node.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation
select case when pg_postmaster_start_time() <> $6 then 'other_server'
            when (c.owner, c.epoch) is distinct from ($3, $4) then 'lease_lost'
            when c.reset_epoch <> $5 then 'reset'
            -- xmin is the lower half of the number; savepoints have higher ones than their transaction.
            when mine.since < 2147483648 and pg_xact_status((mine.first + mine.since)::text::xid8) = 'in progress'
                 then 'uncommitted'
            else 'acknowledged' end
  from shardmq.partition p
  left join shardmq.cursor c on c.group_name = $1 and c.partition = p.partition
 cross join lateral (
       select t.first, mod(c.xmin::text::numeric - mod(t.first, 4294967296) + 4294967296, 4294967296) as since
         from (select pg_current_xact_id_if_assigned()::text::numeric as first) t) mine
 where p.partition = $2
